"""Figures of lines and dots. Each function takes the runs and gives a figure with its numbers, or None."""

import itertools

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure
from scipy.stats import gmean

from moepress.models.limits import fits_router
from moepress.report.paired import increase
from moepress.report.reading import base_of, first_seeds, reference_of
from moepress.report.run import Run, shift_by_layer
from moepress.report.style import MUTED, plt, series_styles, shorten
from moepress.report.table import mean_over_domains

Drawn = tuple[Figure, pd.DataFrame] | None
MOST_LABELS = 12
"""Lines that are named beside their ends; more get a legend."""
MOST_NAMES = 5
"""Points of the figure of pruning that are named beside them; more get markers of their own."""
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}


def quality(runs: list[Run]) -> Drawn:
    """Perplexity against the checkpoint's size; a panel for the domains of the corpus and one for those out of it."""
    points = [point for run in runs if not run.is_pruned for point in _quality_points(run, runs)]
    if not points:
        return None
    data = pd.DataFrame(points)
    shown = data[~data["is_reference"]]
    if shown.empty:
        return None
    largest = shown["checkpoint_bytes"].max()
    scale, unit = next(found for found in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if largest >= found[0])
    panels = list(dict.fromkeys(data["text"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    styles, named = {series: style for series, style in series_styles(runs).items() if series in set(shown["series"])}, []
    for axis, panel in zip(axes[0], panels, strict=True):
        here = shown[shown["text"] == panel]
        ends = []
        for series, rows in here.groupby("series", sort=False):
            style = styles[series]
            rows = rows.sort_values("checkpoint_bytes")
            x = rows["checkpoint_bytes"] / scale
            marks = {"color": style["color"], "linestyle": "none", "marker": ".", "markersize": 4}
            axis.errorbar(x, rows["ppl"], rows["paired_stderr"], capsize=3, elinewidth=1.2, **marks)
            line = rows.groupby("target", sort=False).agg({"checkpoint_bytes": "mean", "ppl": gmean})  # over seeds
            axis.plot(line["checkpoint_bytes"] / scale, line["ppl"], **style)
            ends.append((line["checkpoint_bytes"].iloc[-1] / scale, line["ppl"].iloc[-1], series, style["color"]))
        levels = data[data["is_reference"] & (data["text"] == panel)]
        for level, name in levels[["ppl", "series"]].drop_duplicates().itertuples(index=False):
            axis.axhline(level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
            axis.annotate(
                shorten(name),
                (0, level),
                (6, -4),  # below: what is compressed lies above, seldom under it
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="top",
                color=MUTED,
            )
        values = pd.concat([here["ppl"], levels["ppl"]])
        if values.max() > 3 * values.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axis.margins(x=0.08, y=0.08)
        axis.set(title=f"Perplexity, {panel}", xlabel=f"checkpoint size ({unit})", ylabel="")
        if data["num_weights"].nunique() == 1:
            factor = 8 * scale / data["num_weights"].iloc[0]
            above = axis.secondary_xaxis("top", functions=(lambda s, f=factor: s * f, lambda b, f=factor: b / f))
            above.set_xlabel("bits per weight, everything counted", fontsize=9)
            above.spines["top"].set_visible(True)
        named.append((axis, ends))
    if len(styles) > MOST_LABELS:
        _legend(figure, styles)
    else:
        figure.draw_without_rendering()
        for axis, ends in named:
            _label_ends(axis, ends)
    return figure, data


def pruning(runs: list[Run]) -> Drawn:
    """Perplexity against the experts that are computed for each token, a line for each way to prune a checkpoint and seed."""
    lines: dict[tuple[str, int], list[Run]] = {}
    for run in (run for run in runs if run.is_pruned):
        if base := base_of(run, runs):
            lines.setdefault((base.name, run.seed), [base]).append(run)
    found = []
    for (_, sample), members in lines.items():
        for run in members:
            row = {"checkpoint": members[0].title, "sample": sample, "method": run.pruning["method"]}
            row |= {"pruning": run.pruning_label or "none", "experts_per_token": run.shape.top_k * run.metrics["active_slots"]}
            found += [row | point for point in _quality_points(run, runs)]
    if not found:
        return None
    data = pd.DataFrame(found)
    texts = list(dict.fromkeys(data["text"]))
    figure, axes = plt.subplots(1, len(texts), figsize=(5.6 * len(texts), 4), squeeze=False)
    styles = series_styles(runs)  # without those of 16-bit models
    names = list(dict.fromkeys(data["pruning"]))
    markers = dict(zip(names, itertools.cycle("oDs^v<>PX*ph8d"), strict=False))
    for axis, text in zip(axes[0], texts, strict=True):
        for (title, _), rows in data[data["text"] == text].groupby(["checkpoint", "sample"], sort=False):
            colour = styles.get(rows["series"].iloc[0], {"color": MUTED})["color"]
            rows = rows.sort_values("experts_per_token")
            x, y = rows["experts_per_token"], rows["ppl"]
            look = {
                "color": colour,
                "linestyle": "none",
                "marker": "o" if len(names) <= MOST_NAMES else "none",
                "capsize": 3,
                "elinewidth": 1.2,
                "label": title,
            }
            axis.errorbar(x, y, rows["paired_stderr"], **look)
            for method in dict.fromkeys(rows["method"]):  # from the checkpoint itself to ever fewer experts
                line = rows[rows["method"].isin(["none", method])]
                axis.plot(line["experts_per_token"], line["ppl"], color=colour)
            if len(names) > MOST_NAMES:
                for label, *place in zip(rows["pruning"], x, y, strict=True):
                    axis.plot(*place, linestyle="none", color=colour, marker=markers[label], markersize=9)
                continue
            for label, *place in zip(rows["pruning"], x, y, strict=True):
                # above the pruned ones and below the other, which may lie close together
                words, offset = ("unpruned", (7, -13)) if label == "none" else (label, (7, 7))
                axis.annotate(words, place, offset, textcoords="offset points", color=colour, fontsize=9.5)
        axis.margins(x=0.25, y=0.15)
        axis.set(title=f"Perplexity, {text}", xlabel="experts computed for each token")
    named = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))  # each once, not by seed
    handles, labels = list(named.values()), list(named)
    if len(names) > MOST_NAMES:
        handles += [plt.Line2D([], [], linestyle="none", color=MUTED, marker=markers[name], markersize=9) for name in names]
        labels += ["unpruned" if name == "none" else name for name in names]
    figure.legend(handles, [shorten(name, 44) for name in labels], loc="outside lower center", ncols=min(4, len(labels)))
    return figure, data


def _quality_points(run: Run, runs: list[Run]) -> list[dict]:
    inside, outside = run.domains
    reference = reference_of(run, runs)
    found = []
    for title, domains in (
        (_named("domains of the corpus", inside), inside),
        (_named("out of domain", outside), outside),
    ):
        if domains:
            nll = mean_over_domains(run.blocks, domains)[0]
            error = increase([run], [reference], domains).stderr if reference else np.nan
            row = {"text": title, "series": run.series, "run": run.name, "target": run.target, "seed": run.seed}
            row |= {"is_reference": run.is_reference, "checkpoint_bytes": run.checkpoint_bytes}
            row |= {"num_weights": run.num_weights, "ppl": np.exp(nll), "paired_stderr": np.exp(nll) * error}
            found.append(row)
    return found


def _named(title: str, domains: list[str]) -> str:
    return f"{title} ({', '.join(domains)})" if len(domains) < 3 else f"mean over {len(domains)} {title}"


def _label_ends(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of the panel, at its last point's height, pushed apart where they would overlap."""
    to_axes = axis.transData + axis.transAxes.inverted()
    gap = 15 / (axis.get_window_extent().height * 72 / axis.figure.dpi)
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_axes.transform((x, y))[1] for x, y, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    heights[-1] = min(heights[-1], max(1.0, gap * (len(heights) - 1)))
    for index in range(len(heights) - 2, -1, -1):
        heights[index] = min(heights[index], heights[index + 1] - gap)
    for (x, y, text, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            shorten(text),
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9.5,
            arrowprops={**LEADER, "color": colour},
        )


def _legend(figure: Figure, styles: dict[str, dict]) -> None:
    handles = [plt.Line2D([], [], label=shorten(series), **style) for series, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), handlelength=3)


def selection_shift(runs: list[Run]) -> Drawn:
    """Share of selected slots that differ from the 16-bit model's, by layer; a panel for each size."""
    found = []
    for run in sorted(runs, key=lambda run: run.width):
        by_layer = shift_by_layer(run.metrics)
        if run.is_reference or not by_layer:
            continue
        row = {"target": run.target, "series": run.series, "run": run.name}
        layers = run.shape.moe_layers
        found += [row | {"layer": layer, "selection_shift": value} for layer, value in zip(layers, by_layer, strict=True)]
    if not found:
        return None
    data, styles = pd.DataFrame(found), series_styles(runs)
    figure, panels = _grid(list(dict.fromkeys(data["target"])), width=4.2, height=3.4)
    for target, axis in panels.items():
        for (series, _), rows in data[data["target"] == target].groupby(["series", "run"], sort=False):
            few = len(rows) <= 32
            style = styles[series] if few else {**styles[series], "marker": "none"}
            style = {**style, "linewidth": 1.1} if style["markerfacecolor"] == "white" else style
            axis.plot(rows["layer"], 100 * rows["selection_shift"], **style)
        axis.set(title=target, xlabel="layer")
        _whole_numbers(axis, rows["layer"])
    _shifts_axis(panels)
    _legend(figure, {series: style for series, style in styles.items() if series in set(data["series"])})
    return figure, data


def speed(runs: list[Run]) -> Drawn:
    """Prefill and decode against the 16-bit model in the same process: medians, and quartile against quartile."""
    found = []
    for run in first_seeds(runs):
        for phase in ("prefill", "decode"):
            if speedup := run.speedup(phase):
                row: dict = {"run": run.name, "title": run.title, "series": run.series, "phase": phase}
                row |= {"milliseconds": speedup.milliseconds, "milliseconds_16bit": speedup.milliseconds_16bit}
                row |= {"speedup": speedup.value, "low": speedup.low, "high": speedup.high}
                found.append(row | {"device": run.latency["device"]})
    if not found:
        return None
    data, styles = pd.DataFrame(found), series_styles(runs)
    names = list(dict.fromkeys(data["run"]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.28 * len(names)), sharey=True)
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        axis.axvline(1, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
        for place, (_, row) in enumerate(data[data["phase"] == phase].iterrows()):
            style = {key: styles[row["series"]][key] for key in ("color", "marker", "markerfacecolor")}
            axis.plot([row["low"], row["high"]], [place, place], color=style["color"], linewidth=2.5, alpha=0.45)
            axis.plot([row["speedup"]], [place], linestyle="none", **style)
        axis.set(title=f"{phase} speed, 16 bit = 1", xlabel="times as fast as 16 bit")
        axis.grid(axis="x", visible=False)
    titles = data.drop_duplicates("run")["title"]
    axes[0].set_yticks(range(len(names)), [shorten(title, 44) for title in titles])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    return figure, data


def router_fit(runs: list[Run]) -> Drawn:
    """What re-fitting the router repairs in each layer, on the calibration text; a panel for each QESC checkpoint."""
    found, seen = [], set()
    for run in sorted(first_seeds(runs), key=lambda run: run.width):
        if not fits_router(run.quantization) or run.is_pruned or run.artefacts["quantization"] in seen:
            continue
        seen.add(run.artefacts["quantization"])
        for layer in run.diagnostics:
            if "selection_shift" in layer:  # a dense layer selects nothing
                row = {"run": run.name, "title": run.title, "layer": layer["layer"]}
                found.append(row | {"before": layer["selection_shift_before_fit"], "after": layer["selection_shift"]})
    if not found:
        return None
    data = pd.DataFrame(found)
    figure, panels = _grid(list(dict.fromkeys(data["title"])), width=3.6, height=2.9)
    colour = "#d55e00"
    for title, axis in panels.items():
        rows = data[data["title"] == title]
        before, after = 100 * rows["before"], 100 * rows["after"]
        dots = {"marker": "o"} if len(rows) <= 32 else {}
        axis.fill_between(rows["layer"], before, after, color=colour, alpha=0.12, linewidth=0)
        axis.plot(rows["layer"], before, color=MUTED, linestyle=(0, (4, 1.5)), markerfacecolor="white", **dots)
        axis.plot(rows["layer"], after, color=colour, **dots)
        axis.set(title=f"{shorten(title)}\n{before.mean():.1f} % before, {after.mean():.1f} % after", xlabel="layer")
        _whole_numbers(axis, rows["layer"])
    _shifts_axis(panels)
    handles = [
        plt.Line2D([], [], color=MUTED, linestyle=(0, (4, 1.5)), label="router as it was"),
        plt.Line2D([], [], color=colour, label="router fitted"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, data


def _grid(names: list[str], width: float, height: float):
    """A figure with a panel for each name, at most three in a row, on one y axis."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (max(width * columns, 6.4), height * lines + 0.7)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    return figure, dict(zip(names, axes.flat, strict=False))


def _shifts_axis(panels: dict) -> None:
    """After all is drawn: the panels share one axis, and its upper end stays where it is once the lower is set."""
    first = next(iter(panels.values()))
    first.set_ylim(bottom=0)
    first.set_ylabel("changed selections (%)")


def _whole_numbers(axis, values) -> None:
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(min(values) - 0.3, max(values) + 0.3)
