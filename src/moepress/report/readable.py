"""The table for people: rounded, with standard errors, grouped by size. The page and summary.md both show it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from moepress.report.compare import digits, marks, mebibytes, percent
from moepress.report.reading import Run, reference_of

MARKS = {"best": "★", "tied": "≈", "": ""}
LEGEND = (
    "★ lowest perplexity at its size; ≈ not to be told from it, less than two standard errors of the paired difference "
    "away. Percentages below a perplexity are its change from 16 bits. ± is one standard error over blocks of test "
    "text; those of changes are paired with the same blocks at 16 bits, and say nothing about another calibration "
    "sample. Size counts everything in the checkpoint's weight files; bits on disk are that size per weight. Prefill "
    "and decode: how many times as fast as at 16 bits, and the time of one prefill and of one decoded token. Accuracy is the "
    "mean over the tasks, ± over their items; an asterisk marks tasks of which only the first items were asked."
)


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
    """Rows by the size asked for, largest first; columns that say nothing in this report are left out."""
    marked = marks(runs)
    rows = [Row(marked[run.name], _cells(run, row, runs)) for run, (_, row) in zip(runs, table.iterrows(), strict=True)]
    empty = {heading for heading in rows[0].cells if all(row.cells[heading] == NOTHING for row in rows)}
    if not any(run.is_pruned for run in runs):
        empty.add("experts per token")
    rows = [Row(row.mark, {k: v for k, v in row.cells.items() if k not in empty}) for row in rows]
    found: dict[str, list[Row]] = {}
    for run, row in sorted(zip(runs, rows, strict=True), key=lambda pair: -pair[0].width):
        found.setdefault(run.target, []).append(row)
    return [Group(title, members) for title, members in found.items()]


def _cells(run: Run, row: pd.Series, runs: list[Run]) -> dict[str, Cell]:
    reference = reference_of(run, runs)
    compressed = not run.is_reference
    smaller = f"{reference.checkpoint_bytes / run.checkpoint_bytes:.1f}× smaller" if reference and compressed else ""
    shift = _share(row["selection_shift"], row["selection_shift_stderr"]) if compressed else NOTHING
    took = "" if np.isnan(row["quantize_seconds"]) else seconds(row["quantize_seconds"])
    return {
        "method": (run.series, run.name),
        "perplexity": (_number(row["ppl_mean"]), _change(row, "delta_nll") if compressed else ""),
        "out of domain": (_number(row["ppl_ood"]), _change(row, "delta_nll_ood") if compressed else ""),
        "accuracy": _accuracy(row) if "acc_mean" in row else NOTHING,
        "bits": (f"{row['bits_nominal']:.3g}", f"{row['bits_effective']:.2f} on disk"),
        "size": (mebibytes(run.checkpoint_bytes), smaller),
        "changed selections": shift,
        "experts per token": (f"{row['activated_experts']:.2f}", ""),
        "prefill": (f"{row['speedup_prefill']:.2f}×" if compressed else "1", milliseconds(row["prefill_ms"])),
        "decode": (f"{row['speedup_decode']:.2f}×" if compressed else "1", milliseconds(row["decode_ms"])),
        "quantized in": (took, ""),
    }


def domain_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Perplexity by domain, out-of-domain ones last: the headings, and a row for each run."""
    inside, outside = runs[0].domains
    rows = []
    for run in runs:
        found = [run.metrics["domains"][domain] for domain in inside + outside]
        rows.append([run.title, *(f"{_number(one['ppl'])} ± {_number(one['ppl_stderr'], 2)}" for one in found)])
    return ["run", *inside, *(f"{domain} (out)" for domain in outside)], rows


def task_table(runs: list[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Scores by task, in percent where they are shares: the headings, and a row for each run; None without tasks."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows = [[run.title, *(_score(run.tasks.get(task)) for task in tasks)] for run in runs]
    return (["run", *tasks], rows) if tasks else None


def markdown(name: str, caption: str, sentences: list[str], found: list[Group]) -> str:
    """The report for a terminal."""
    headings = list(found[0].rows[0].cells)
    lines = [f"# {_flat(name)}", "", _flat(caption), "", *(f"- {_flat(sentence)}" for sentence in sentences), ""]
    lines += [_pipes(["", *headings]), _pipes(["---"] * (len(headings) + 1))]
    for group in found:
        for row in group.rows:
            lines.append(
                _pipes([MARKS[row.mark], *(f"{cell} ({small})" if small else cell for cell, small in row.cells.values())])
            )
    return "\n".join([*lines, "", LEGEND, ""])


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


def _change(row: pd.Series, column: str) -> str:
    return "" if np.isnan(row[column]) else percent(row[column], row[f"{column}_stderr"])


def _share(value: float, error: float) -> Cell:
    known = error is not None and not np.isnan(error)
    places = digits(100 * error) if known else 1
    return f"{100 * value:.{places}f}\u00a0%", f"±\u00a0{100 * error:.{places}f}" if known else ""


def _accuracy(row: pd.Series) -> Cell:
    if np.isnan(row["acc_mean"]):
        return NOTHING
    value, error = _share(row["acc_mean"], row["acc_mean_stderr"])
    return f"{value}{'' if np.isnan(row['limit']) else '*'}", error


def _score(score: dict | None) -> str:
    if score is None or score["value"] is None:
        return ""
    value, error = _share(score["value"], score["stderr"])
    return f"{value} {error}".strip() + ("*" if score["limited"] else "")


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 999.5 else f"{value / 1000:.3g} s"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"
