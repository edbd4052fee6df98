"""The table, the figures and the page over any number of runs."""

from moepress.artefacts import Task
from moepress.report import figures, page, reading, table

HEADERS_ONLY = ("model", "quantization")


def run(task: Task) -> None:
    config = task.config
    runs = reading.load(config["runs"], task.out.parent.parent)
    rows = table.tabulate(runs)
    rows.to_csv(task.out / "runs.csv", index=False, lineterminator="\n")
    drawn = figures.draw_all(runs, task.out / "figures")
    page.write(config["name"], config["caption"], runs, rows, task.out, drawn)
