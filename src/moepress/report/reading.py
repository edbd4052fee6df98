"""The runs of a report: read from its configuration, checked to be comparable, and told which belong together."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from moepress.report.run import Run


def run_of(run: dict, results: Path) -> Run:
    """A run as a report's configuration lists it."""
    fields = ("seed", "is_reference", "quantization", "allocation", "pruning", "artefacts")
    return Run(name=run["run"], **{field: run[field] for field in fields}, results=results)


def load(runs: list[dict], results: Path) -> list[Run]:
    """The runs that a report's configuration lists. Raises ValueError if they were not measured on the same text."""
    found = [run_of(run, results) for run in runs]
    if not found:
        raise ValueError("a report needs at least one run")
    check_same_text(found)
    check_same_items(found)
    return found


def of_report(folder: Path) -> list[Run]:
    """The runs of a finished report, by its folder: for notebooks and scripts."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no report; it has no config.yaml")
    return load(yaml.safe_load(path.read_text(encoding="utf-8"))["config"]["runs"], folder.parent.parent)


def methods(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that are one configuration under several seeds, together, in the order of their first."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.artefacts["model"], run.series, run.target), []).append(run)
    return list(found.values())


def first_seeds(runs: Iterable[Run]) -> list[Run]:
    """One run of each configuration, for what hardly depends on the seed or cannot be averaged."""
    return [group[0] for group in methods(runs)]


def check_same_text(runs: list[Run]) -> None:
    """Raise ValueError naming the runs whose test text differs: their perplexities cannot stand in one table."""
    first = runs[0]
    for run in runs[1:]:
        own, other = ({d: m["tokens_sha256"] for d, m in r.metrics["domains"].items()} for r in (run, first))
        if set(own) != set(other):
            differ = f"{', '.join(sorted(set(own) ^ set(other)))} (in one of them only)"
        else:
            differ = ", ".join(domain for domain in own if own[domain] != other[domain])
        if differ:
            raise ValueError(
                f"the runs {first.name!r} and {run.name!r} were evaluated on different text of {differ}, so one table "
                "cannot compare them; report them apart, or give them one corpus, tokenizer and evaluation.*"
            )


def check_same_items(runs: list[Run]) -> None:
    """Raise ValueError naming the runs that were asked other items, or in other words, under the same task's name."""
    first: dict[str, Run] = {}
    for run in runs:
        for task, score in run.task_scores.items():
            other = first.setdefault(task, run)
            known = other.task_scores[task]
            if score["items_sha256"] != known["items_sha256"] or score["metric"] != known["metric"]:
                raise ValueError(
                    f"the runs {other.name!r} and {run.name!r} answered different items or prompts of {task}, so one table "
                    "cannot compare them; report them apart, or give them one corpus, evaluation.source, limit and num_fewshot"
                )


def reference_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """The 16-bit run of the same model, which `run` is measured against."""
    found = [other for other in runs if other.is_reference and other.artefacts["model"] == run.artefacts["model"]]
    return found[0] if found else None


def base_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """What a pruned run prunes: the 16-bit model, or the same checkpoint; where that is not drawn, its only run."""
    if not run.is_quantized:
        return reference_of(run, runs)
    same = [other for other in runs if not other.is_pruned and other.unpruned == run.unpruned]
    return next((other for other in same if other.seed == run.seed), same[0] if len(same) == 1 else None)
