"""index.html: one self-contained page, and summary.md, the same table for a terminal."""

import base64
import re
from pathlib import Path

import jinja2
import pandas as pd

from moepress.report import compare, costs, facts, interactive, readable
from moepress.report.figures import FIGURES
from moepress.report.run import Run
from moepress.report.template import PAGE

POINTS_TO_PIXELS = 1.17
"""Makes the figures' lettering as large as the page's small print."""


def write(name: str, caption: str, runs: list[Run], table: pd.DataFrame, out: Path, figures: list[str]) -> None:
    """Write index.html, costs.csv and summary.md into `out`, which holds figures/NAME.svg of each of `figures` already."""
    spent = costs.tabulate(runs)
    spent.to_csv(out / "costs.csv", index=False, lineterminator="\n")
    sentences = compare.summary(runs)
    groups = readable.groups(runs, table)
    repeated = readable.repeated(groups)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(PAGE).render(
        name=name,
        caption=caption,
        sentences=sentences,
        groups=groups,
        headings=[heading for heading in groups[0].rows[0].cells if heading not in repeated],
        repeated=repeated,
        marks=readable.MARKS,
        legend=readable.legend(groups),
        domain_table=readable.domain_table(runs),
        task_table=readable.task_table(runs),
        paired_table=readable.paired_table(runs),
        pictures=interactive.draw(runs),
        libraries=interactive.library(),
        figures=[_figure(figure, out / "figures") for figure in figures],
        facts=facts.all_facts(runs),
        cost_table=costs.table(spent),
        sources=facts.sources(runs),
        runs=runs,
    )
    (out / "index.html").write_text(html, encoding="utf-8")
    (out / "summary.md").write_text(readable.markdown(name, caption, sentences, groups), encoding="utf-8")


def _figure(name: str, folder: Path) -> dict:
    entry = FIGURES[name]
    svg = (folder / f"{name}.svg").read_bytes()
    width = re.search(rb'width="([\d.]+)pt"', svg)
    assert width is not None  # as matplotlib writes it
    points = float(width.group(1))
    encoded = base64.b64encode(svg).decode("ascii")
    width = round(points * POINTS_TO_PIXELS)
    return {"name": name, "title": entry.title, "caption": entry.caption, "width": width, "base64": encoded}
