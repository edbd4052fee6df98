"""The figure of the tasks' scores. Like those in `lines`: runs -> a figure with its numbers, or None."""

import pandas as pd
from matplotlib.figure import Figure

from moepress.report.reading import methods
from moepress.report.run import Run
from moepress.report.style import MUTED, plt, series_styles, shorten
from moepress.report.table import is_share

COLUMNS = 4


def accuracy(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """Each task's score by method (mean over seeds), a panel for each task, with the level of 16 bits and that of chance."""
    found = []
    for group in methods(runs):
        run = group[0]
        for task, score in run.task_scores.items():
            each = [member.task_scores[task] for member in group]
            row = {"task": task, "run": run.name, "title": run.title, "series": run.series, "metric": score["metric"]}
            value, stderr = (pd.Series([one[name] for one in each], dtype=float).mean() for name in ("value", "stderr"))
            row |= {"value": value, "stderr": stderr, "chance": score["chance"], "seeds": len(group)}
            found.append(row | {"num_items": score["num_items"], "limited": score["limited"], "is_reference": run.is_reference})
    if not found:
        return None
    data, styles = pd.DataFrame(found), series_styles(runs)
    tasks, names = (list(dict.fromkeys(data[column])) for column in ("task", "run"))
    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (max(2.6 * columns + 2.4, 6.4), lines * (1.3 + 0.26 * len(names)))
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for task, axis in zip(tasks, axes.flat, strict=False):
        rows = data[data["task"] == task]
        metric = rows["metric"].iloc[0].split(",")[0]
        scale, unit = (100, " (%)") if is_share(metric) else (1, "")
        axis.axvline(scale * rows["chance"].iloc[0], color=MUTED, linestyle=":", linewidth=1.2)
        for level in rows.loc[rows["is_reference"], "value"]:
            axis.axvline(scale * level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
        for _, row in rows.iterrows():
            style = styles.get(row["series"], {"color": MUTED, "marker": "o", "markerfacecolor": MUTED})
            marks = {key: style[key] for key in ("color", "marker", "markerfacecolor")}
            error = None if pd.isna(row["stderr"]) else scale * row["stderr"]
            axis.errorbar(scale * row["value"], names.index(row["run"]), xerr=error, linestyle="none", capsize=2, **marks)
        some = f"first {rows['num_items'].iloc[0]} items" if rows["limited"].any() else f"{rows['num_items'].iloc[0]} items"
        axis.set(title=f"{shorten(task, 30)}\n{some}", xlabel=f"{metric}{unit}")
        axis.grid(axis="y", visible=False)
    titles = data.drop_duplicates("run")["title"]
    axes[0, 0].set_yticks(range(len(names)), [shorten(title, 44) for title in titles])
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    return figure, data
