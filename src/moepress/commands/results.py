"""moepress results [REPORT] [--filter COLUMN=VALUE ...] [--sort COLUMN] [--csv]: the table of a report."""

import argparse
import csv
import re
import sys

from moepress import execution, lookup
from moepress.wording import aligned, readable

COLUMNS = {
    "run": "run",
    "bits_effective": "bits/weight",
    "checkpoint_bytes": "size",
    "ppl_mean": "perplexity",
    "delta_nll": "nats over 16 bit",
    "ppl_ood": "out of domain",
    "divergence": "divergence",
    "acc_mean": "accuracy",
    "selection_shift": "shift",
    "speedup_prefill": "prefill",
    "speedup_decode": "decode",
}
"""Of runs.csv, what the terminal shows, and its heading. Columns with nothing in them are left out."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress results",
        description="Print the table of a report.",
        epilog="The table shows the columns that matter most; --csv prints all of runs.csv. prefill, decode: how many times as "
        "fast as the 16-bit model.",
    )
    parser.add_argument(
        "report", nargs="?", help="its folder, id, key or label, or a run's name: the newest that has it (default: the newest)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="only such rows; also COLUMN<=VALUE, >=; may repeat",
    )
    parser.add_argument("--sort", metavar="COLUMN", help="smallest first")
    parser.add_argument("--descending", action="store_true", help="largest first")
    parser.add_argument("--csv", action="store_true", help="every column, as CSV")
    lookup.add_results(parser)
    given = parser.parse_args(arguments)
    found = lookup.report(given.report, given.results)
    rows = chosen(execution.rows(found.path), given.filter, given.sort, given.descending)
    if given.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(table(rows))
        print(found.path)


def chosen(rows: list[dict], filters: list[str], sort: str | None, descending: bool = False) -> list[dict]:
    """Rows of runs.csv that pass every filter, sorted; empty values last. Raises ValueError naming what does not fit."""
    for condition in filters:
        parts = re.fullmatch(r"(\w+)(<=|>=|=)(.*)", condition)
        if not parts:
            raise ValueError(f"--filter {condition}: COLUMN=VALUE, COLUMN<=VALUE or COLUMN>=VALUE")
        name, relation, wanted = parts[1], parts[2], execution.value(parts[3])
        check_column(name, rows, "--filter")
        rows = [row for row in rows if holds(row[name], relation, wanted)]
        if not rows:
            raise ValueError(f"--filter {condition}: no row of this report is so")
    if sort:
        check_column(sort, rows, "--sort")
        known = [row for row in rows if row[sort] is not None]
        is_text = any(isinstance(row[sort], str) for row in known)
        known.sort(key=lambda row: str(row[sort]) if is_text else row[sort], reverse=descending)
        rows = known + [row for row in rows if row[sort] is None]
    return rows


def holds(value, relation: str, wanted) -> bool:
    if relation == "=":
        return value == wanted
    both = isinstance(value, int | float) and isinstance(wanted, int | float)
    return both and (value <= wanted if relation == "<=" else value >= wanted)


def check_column(name: str, rows: list[dict], option: str) -> None:
    if name not in rows[0]:
        raise ValueError(f"{option} {name}: no such column; there is {', '.join(rows[0])}")


def table(rows: list[dict]) -> str:
    """For a terminal: the most important columns, values with their standard errors."""
    shown = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    cells = [tuple(COLUMNS[name] for name in shown)]
    cells += [tuple(cell(name, row) for name in shown) for row in rows]
    return "\n".join(aligned(cells))


def sideways(rows: list[dict]) -> str:
    """The same with a column for each row: for the few of a single experiment."""
    shown = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    return "\n".join(aligned([(COLUMNS[name], *(cell(name, row) for row in rows)) for name in shown]))


def cell(name: str, row: dict) -> str:
    value, error = row.get(name), row.get(f"{name}_stderr")
    if value is None:
        return ""
    if name == "checkpoint_bytes":
        return readable(value)
    if not isinstance(value, int | float):
        return str(value)
    if name.startswith("speedup"):
        return f"{value:.2f}x"
    text = f"{value:.4g}" if name.startswith(("ppl", "divergence")) else f"{value:.3f}"
    return f"{text} ± {error:.2g}" if isinstance(error, int | float) and error > 0 else text
