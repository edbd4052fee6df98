"""The table for people: rounded, with standard errors, grouped by size. The page and summary.md both show it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from moepress.report import paired
from moepress.report.compare import digits, marks, percent
from moepress.report.paired import Difference, increase
from moepress.report.reading import methods, reference_of
from moepress.report.run import Run
from moepress.report.table import is_share
from moepress.wording import decimal, rounded_bytes

MARKS = {"best": "★", "tied": "≈", "": ""}
BEST = "★ lowest perplexity at its size (of checkpoints whose bytes agree within 1 %)."
TIED = "≈ not to be told from ★: the 95 % interval of the paired difference holds zero."
LEGEND = (
    "Percentages below a perplexity are its change from 16 bits. ± is one standard error over blocks of test "
    "text; those of changes are paired with the same blocks at 16 bits; with several seeds they hold the scatter of "
    "calibration samples, with one they say nothing about another sample. Size counts everything in the checkpoint's "
    "weight files; bits on disk are that size per weight."
)
SPEED = (
    "Prefill and decode: how many times as fast as at 16 bits, and the median time of one prefill and of one decoded token "
    "for that of the 16-bit model, timed in turn in the same process; times of two rows may come from other hours of a machine "
    "that others use."
)
ACCURACY = (
    "Accuracy is the mean over the tasks, ± over their items; an asterisk marks tasks of which only the first items were asked."
)
DIVERGENCE = (
    "Divergence: of the predictions from the 16-bit model's, in nats per token in the domains of the corpus, and the share of "
    "tokens after which both think the same next one most likely."
)
DESCRIBING = ("bits", "size", "experts per token", "quantized in")
"""Columns that say what a row is, not how good: a page need not repeat them."""

PERCENT = "\u00a0%"

Cell = tuple[str, str]
"""A number and the smaller print below it."""

NOTHING = ("", "")


@dataclass(frozen=True)
class Row:
    """mark: a key of MARKS. cells: by column heading."""

    mark: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Group:
    """The rows of one size."""

    title: str
    rows: list[Row]


def groups(runs: list[Run], table: pd.DataFrame) -> list[Group]:
    """A row for each method, the mean over its seeds, by the size asked for, largest first; columns that say nothing in this
    report are left out."""
    marked, numbers = marks(runs), dict(zip((run.name for run in runs), table.iloc, strict=True))  # names differ
    members = methods(runs)
    rows = [Row(marked[own[0].name], _cells(own, pd.DataFrame([numbers[run.name] for run in own]), runs)) for own in members]
    empty = {heading for heading in rows[0].cells if all(row.cells[heading] == NOTHING for row in rows)}
    if not any(run.is_pruned for run in runs):
        empty.add("experts per token")
    rows = [Row(row.mark, {k: v for k, v in row.cells.items() if k not in empty}) for row in rows]
    found: dict[str, list[Row]] = {}
    for own, row in sorted(zip(members, rows, strict=True), key=lambda pair: -pair[0][0].width):
        found.setdefault(own[0].target, []).append(row)
    return [Group(title, members) for title, members in found.items()]


def _cells(own: list[Run], table: pd.DataFrame, runs: list[Run]) -> dict[str, Cell]:
    """Of one method's runs and their rows of runs.csv."""
    run, reference = own[0], reference_of(own[0], runs)
    compressed = not run.is_reference
    row = table.mean(numeric_only=True)
    (inside, outside), against = run.domains, [reference] if reference and compressed else None
    changes = [percent(increase(own, against, domains)) if against and domains else "" for domains in (inside, outside)]
    ppl = {name: np.exp(np.log(table[name]).mean()) for name in ("ppl_mean", "ppl_ood")}
    smaller = f"{reference.checkpoint_bytes / row['checkpoint_bytes']:.1f}× smaller" if reference and compressed else ""
    took = "" if np.isnan(row["quantize_seconds"]) else seconds(row["quantize_seconds"])
    return {
        "method": (run.series, run.name if len(own) == 1 else f"{len(own)} seeds"),
        "perplexity": (_number(ppl["ppl_mean"]), changes[0]),
        "out of domain": (_number(ppl["ppl_ood"]), changes[1]),
        "accuracy": _accuracy(row) if "acc_mean" in row else NOTHING,
        "divergence": _divergence(row) if "divergence" in row else NOTHING,
        "bits": (f"{row['bits_nominal']:.3g}", f"{row['bits_effective']:.2f} on disk"),
        "size": (rounded_bytes(row["checkpoint_bytes"]), smaller),
        "changed selections": _share(row["selection_shift"], row["selection_shift_stderr"]) if compressed else NOTHING,
        "experts per token": (f"{row['activated_experts']:.2f}", ""),
        "prefill": _time(row, "prefill", compressed),
        "decode": _time(row, "decode", compressed),
        "quantized in": (took, ""),
    }


def _divergence(row: pd.Series) -> Cell:
    """Of the predictions from the 16-bit model's, in the domains of the corpus, and how often both would go on alike."""
    if np.isnan(row["divergence"]):
        return NOTHING
    return _number(row["divergence"], 3), f"{100 * row['same_choice']:.1f}{PERCENT} same choice"


def _time(row: pd.Series, phase: str, compressed: bool) -> Cell:
    """Speed against 16 bits where both fit in memory, and both times; nothing of a run that was not timed."""
    taken, base = row.get(f"{phase}_ms", np.nan), row.get(f"{phase}_ms_16bit", np.nan)
    if np.isnan(taken):
        return NOTHING
    if not compressed or np.isnan(base):
        return "" if compressed else "1", milliseconds(taken)
    times = [milliseconds(taken), milliseconds(base)]
    if times[0].split()[1] == times[1].split()[1]:
        times[0] = times[0].split()[0]
    return f"{base / taken:.2f}×", " for ".join(times)


def legend(found: list[Group]) -> str:
    """What the marks and columns of these groups mean."""
    rows = [row for group in found for row in group.rows]
    marked, headings = {row.mark for row in rows}, rows[0].cells
    parts = [BEST] * ("best" in marked) + [TIED] * ("tied" in marked) + [LEGEND]
    parts += [DIVERGENCE] * ("divergence" in headings)
    return " ".join(parts + [SPEED] * ("prefill" in headings) + [ACCURACY] * ("accuracy" in headings))


def repeated(found: list[Group]) -> dict[str, str]:
    """Describing columns with the same words in every row that has any, and the words."""
    rows = [row for group in found for row in group.rows]
    words = {heading: {row.cells[heading] for row in rows} - {NOTHING} for heading in DESCRIBING if heading in rows[0].cells}
    said = {heading: _with_small(*own.pop()) for heading, own in words.items() if len(own) == 1}
    return said if len(rows) > 2 else {}


def domain_table(runs: list[Run]) -> tuple[list[str], list[list[str | Cell]]]:
    """Perplexity by domain, below it bits per byte, out-of-domain ones last: the headings, and a row for each method."""
    inside, outside = runs[0].domains
    rows: list[list[str | Cell]] = []
    for own in methods(runs):
        cells = []
        for domain in inside + outside:
            found = pd.DataFrame([run.metrics["domains"][domain] for run in own])[["nll", "ppl_stderr", "bits_per_byte"]].mean()
            ppl = f"{_number(np.exp(found['nll']))} ± {_number(found['ppl_stderr'], 2)}"
            cells.append((ppl, f"{found['bits_per_byte']:.3f}"))
        rows.append([own[0].title, *cells])
    return ["run", *inside, *(f"{domain} (out)" for domain in outside)], rows


def task_table(runs: list[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Scores by task, in percent where they are shares: the headings, and a row for each method; None without tasks."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.task_scores))
    rows = [[own[0].title, *(_score([run.task_scores.get(task) for run in own]) for task in tasks)] for own in methods(runs)]
    return (["run", *tasks], rows) if tasks else None


def paired_table(runs: list[Run]) -> tuple[list[str], list[list[str | Cell]]] | None:
    """Each method, what it is compared with, and by metric the difference with its interval and what that says; None without
    pairs."""
    pairs = paired.pairs(runs)
    metrics = list(dict.fromkeys(m for pair in pairs for m, one in pair.differences.items() if not np.isnan(one.value)))
    rows: list[list[str | Cell]] = []
    for pair in pairs:
        cells = [_difference(metric, pair.differences.get(metric, paired.NOTHING)) for metric in metrics]
        rows.append([pair.runs[0].title, pair.against, *cells])
    names = {"nll": "perplexity", "nll_ood": "out of domain", "acc": "accuracy"}
    return (["method", "against", *(names.get(m, m.removeprefix("acc_")) for m in metrics)], rows) if rows else None


def _difference(metric: str, one: Difference) -> Cell:
    """`-1.2 % [-1.5, -0.9]` and a verdict."""
    if np.isnan(one.value):
        return NOTHING
    is_ppl = metric.startswith("nll")
    low, value, high = (100 * (np.expm1(part) if is_ppl else part) for part in (one.interval[0], one.value, one.interval[1]))
    places = digits((high - low) / 4)
    text = f"{decimal(value, places)}{PERCENT if is_ppl else ''}"
    if np.isnan(low):
        return text, "noise unknown"
    verdict = "within noise" if one.is_noise else "better" if (one.value < 0) == is_ppl else "worse"
    return f"{text} [{decimal(low, places)}, {decimal(high, places)}]", verdict


def markdown(name: str, caption: str, sentences: list[str], found: list[Group]) -> str:
    """The report for a terminal."""
    headings = list(found[0].rows[0].cells)
    lines = [f"# {_flat(name)}", "", _flat(caption), "", *(f"- {_flat(sentence)}" for sentence in sentences), ""]
    lines += [_pipes(["", *headings]), _pipes(["---"] * (len(headings) + 1))]
    for group in found:
        for row in group.rows:
            lines.append(_pipes([MARKS[row.mark], *(_with_small(*cell) for cell in row.cells.values())]))
    return "\n".join([*lines, "", legend(found), ""])


def _with_small(cell: str, small: str) -> str:
    return f"{cell} ({small})" if small else cell


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in cells) + " |"


def _flat(text: str) -> str:
    return " ".join(str(text).split())


def _number(value: float, significant: int = 4) -> str:
    """A few significant digits without an exponent below a million: 36.31, 1204."""
    if np.isnan(value):
        return ""
    decimals = max(0, significant - 1 - int(np.floor(np.log10(max(value, 1e-9)))))
    return f"{value:.{significant}g}" if value >= 1e6 else f"{value:.{decimals}f}"


def _share(value: float, error: float) -> Cell:
    known = error is not None and not np.isnan(error)
    places = digits(100 * error) if known else 1
    return f"{100 * value:.{places}f}\u00a0%", f"±\u00a0{100 * error:.{places}f}" if known else ""


def _accuracy(row: pd.Series) -> Cell:
    if np.isnan(row["acc_mean"]):
        return NOTHING
    value, error = _share(row["acc_mean"], row["acc_mean_stderr"])
    return f"{value}{'' if np.isnan(row['limit']) else '*'}", error


def _score(scores: list[dict | None]) -> str:
    """The mean over seeds."""
    known = [score for score in scores if score is not None and score["value"] is not None]
    if len(known) < len(scores):
        return ""
    value, error = (pd.Series([score[name] for score in known], dtype=float).mean() for name in ("value", "stderr"))
    words = _share(value, error) if is_share(known[0]["metric"]) else (_number(value), "")
    return " ".join(filter(None, words)) + ("*" if known[0]["limited"] else "")


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 999.5 else f"{value / 1000:.3g} s"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"
