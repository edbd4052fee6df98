"""moepress compare A B: how two runs differ over the same text and items, and what differs in their configurations."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moepress import integrity, lookup
from moepress.commands import results
from moepress.report import paired, reading
from moepress.report.run import Run
from moepress.report.table import tabulate
from moepress.wording import aligned, decimal


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress compare",
        description="What A costs or gains against B, pair by pair, and what differs in their configurations.",
        epilog="A and B: a run's name in a report (without its seed: all seeds together), the key of one of its artefacts, or "
        "such a folder; of a report's folder its last run.",
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--report", help="where to look, its folder, id, key or label (default: in all, the newest first)")
    lookup.add_results(parser)
    given = parser.parse_args(arguments)
    places = [lookup.report(given.report, given.results)] if given.report else lookup.reports(given.results)
    (runs, here), (others, there) = both(given.a, given.b, places)
    reports, texts = [here.path, there.path], [run.folder("evaluation") for run in (*runs, *others)]
    integrity.check([(folder, True) for folder in dict.fromkeys((*reports, *texts))], given.results)
    reading.check_same_text([*runs, *others])
    reading.check_same_items([*runs, *others])
    parts = (
        differences(runs, others),
        numbers(runs, others),
        settings(runs[0], others[0]),
        sources((runs, here), (others, there)),
    )
    print("\n\n".join("\n".join(part) for part in parts))


Side = tuple[list[Run], lookup.StoredArtefact]
"""Runs, and the report that they were found in."""


def both(a: str, b: str, places: list[lookup.StoredArtefact]) -> tuple[Side, Side]:
    """The runs that two names mean: in one report if there is one that has both, else each in the newest that has it."""
    if not places:
        raise ValueError("no report there; run an experiment first, or give --results=DIR")
    found = [[(matching(name, place), place) for place in places] for name in (a, b)]
    for side, other in zip(*found, strict=True):
        if side[0] and other[0]:
            return side, other
    for name, sides in zip((a, b), found, strict=True):
        if not any(runs for runs, _ in sides):
            known = ", ".join(run["run"] for run in places[0].described["config"]["runs"])
            raise ValueError(f"{name}: no report has a run of this name, key or folder; the newest has {known}")
    newest = [next(side for side in sides if side[0]) for sides in found]
    return newest[0], newest[1]


def matching(name: str, report: lookup.StoredArtefact) -> list[Run]:
    """The runs of a report that a name, a key or a folder means."""
    if runs := lookup.named(name, report):
        return [reading.run_of(run, report.results) for run in runs]
    everything, identity = report.described["config"]["runs"], Path(name).name
    if identity in (report.path.name, report.key):
        return [reading.run_of(everything[-1], report.results)]
    stages = ("quantization", "evaluation", "latency")  # which tell runs apart; a model or a corpus is shared
    own = [[run["artefacts"][stage] for stage in stages if stage in run["artefacts"]] for run in everything]
    return [
        reading.run_of(run, report.results)
        for run, folders in zip(everything, own, strict=True)
        if any(identity in (Path(folder).name, folder[-12:]) for folder in folders)
    ][:1]


def differences(runs: list[Run], others: list[Run]) -> Iterator[str]:
    """The paired differences, a line a metric."""
    yield f"{title(runs)} against {title(others)}"
    rows = [("", "difference", "95 % interval", "")]
    for metric, one in paired.Pair(runs, others, paired.SIXTEEN).differences.items():
        if not np.isnan(one.value):
            number, between = numbers_of(one)
            rows.append((NAMES.get(metric, metric), number, between, verdict(metric, one)))
    yield from (f"  {line}" for line in aligned(rows, left_last=True))


NAMES = {"nll": "nats per token", "nll_ood": "the same, out of domain", "acc": "accuracy, all tasks"}


def title(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].title} ({len(runs)} seeds)"


def numbers_of(one: paired.Difference) -> tuple[str, str]:
    """The difference and its interval: four decimals, and as many more as show two digits of half the interval."""
    low, high = one.interval
    if np.isnan(low):
        return decimal(one.value, 4), "unknown: one block only"
    places = int(np.clip(1 - np.floor(np.log10((high - low) / 2)), 4, 8)) if high > low else 4
    return decimal(one.value, places), f"{decimal(low, places)} to {decimal(high, places)}"


def verdict(metric: str, one: paired.Difference) -> str:
    if one.value == one.stderr == 0:
        return "the same"
    if one.is_noise:
        return "within noise"
    is_better = one.value < 0 if metric.startswith("nll") else one.value > 0
    ratio = f", perplexity {100 * np.expm1(one.value):+.2f} %" if metric.startswith("nll") else ""
    return ("better" if is_better else "worse") + ratio


def numbers(runs: list[Run], others: list[Run]) -> Iterator[str]:
    """Their columns of the table, side by side; of several seeds the first, which is said."""
    first = [runs[0], others[0]]
    wanted = [name for name in results.COLUMNS if name not in ("run", "delta_nll")]
    own, other = ({k: None if v != v else v for k, v in row.items()} for row in tabulate(first).to_dict("records"))
    heads = (name if len(side) == 1 else f"{name}, seed {side[0].seed}" for name, side in (("A", runs), ("B", others)))
    rows = [("", *heads)]
    rows += [(results.COLUMNS[n], results.cell(n, own), results.cell(n, other)) for n in wanted if n in own]
    yield from (f"  {line}" for line in aligned([row for row in rows if row[1:] != ("", "")]))


def settings(run: Run, other: Run) -> Iterator[str]:
    """What differs in the configurations of all that they were made from."""
    own, theirs = configuration(run), configuration(other)
    rows = [
        (key, shown(own.get(key)), shown(theirs.get(key)))
        for key in sorted(own.keys() | theirs.keys())
        if own.get(key) != theirs.get(key)
    ]
    yield "what differs" if rows else "nothing differs in their configurations"
    yield from (f"  {line}" for line in aligned([("", "A", "B"), *rows]) if rows)


def sources(*sides: Side) -> Iterator[str]:
    """Which runs were meant: names are those of a report, and other reports may have the same."""
    for name, (runs, place) in zip("AB", sides, strict=True):
        seeds = ", ".join(str(run.seed) for run in runs)
        yield f"{name}: {runs[0].name}, seed {seeds}, of {place.path}"


def configuration(run: Run) -> dict:
    """`group.key` -> value, over the run's artefacts and all that they were made from."""
    found: dict = {}
    for folder in run.artefacts.values():
        for item in lookup.StoredArtefact(run.results, folder).upstream().values():
            is_own = folder != run.artefacts["evaluation"] or item.folder == folder  # not the 16-bit evaluation's
            if item.exists and is_own:
                found |= dict(leaves(item.described["config"], item.stage))
    return found


def leaves(value, stage: str, path: str = "") -> Iterator[tuple[str, object]]:
    """Paths to values; a stage's own group stands for itself, what it reads of others under the stage's name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, stage, f"{path}.{key}" if path else str(key))
    else:
        yield path if path.split(".")[0] == stage else f"{stage}: {path}", value


def shown(value) -> str:
    return "-" if value is None else str(value)
