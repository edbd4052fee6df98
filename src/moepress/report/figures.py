"""The figures. Each function takes the runs and gives a figure with its numbers, or None where there is nothing to show."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from moepress.report import heatmaps
from moepress.report.reading import Run, reference_of
from moepress.report.style import MUTED, RC, plt, save, series_styles, shorten
from moepress.report.table import increase, mean_over_domains

Drawn = tuple[Figure, pd.DataFrame] | None


def quality(runs: list[Run]) -> Drawn:
    """Perplexity against the checkpoint's size; a panel for the domains of the corpus and one for those out of it."""
    points = [point for run in runs for point in _quality_points(run, runs)]
    data = pd.DataFrame(points)
    shown = data[~data["is_reference"]]
    if shown.empty:
        return None
    scale, unit = (2**30, "GiB") if shown["checkpoint_bytes"].max() >= 2**30 else (2**20, "MiB")
    panels = list(dict.fromkeys(data["text"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    styles = series_styles(runs)
    for axis, panel in zip(axes[0], panels, strict=True):
        here = shown[shown["text"] == panel]
        ends = []
        for series, rows in here.groupby("series", sort=False):
            style = styles[series]
            rows = rows.sort_values("checkpoint_bytes")
            x = rows["checkpoint_bytes"] / scale
            marks = {key: style[key] for key in ("color", "marker", "markerfacecolor")}
            axis.errorbar(x, rows["ppl"], rows["paired_stderr"], linestyle="none", capsize=3, elinewidth=1.2, **marks)
            line = rows.groupby("target", sort=False)[["checkpoint_bytes", "ppl"]].mean()
            axis.plot(line["checkpoint_bytes"] / scale, line["ppl"], color=style["color"], linestyle=style["linestyle"])
            ends.append((x.iloc[-1], rows["ppl"].iloc[-1], series, style["color"]))
        levels = data[data["is_reference"] & (data["text"] == panel)]
        for level in levels["ppl"].unique():
            axis.axhline(level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
            axis.annotate(
                "16 bit",
                (0, level),
                (6, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=MUTED,
            )
        values = pd.concat([here["ppl"], levels["ppl"]])
        if values.max() > 3 * values.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.margins(x=0.08, y=0.08)
        axis.set(title=f"Perplexity, {panel}", xlabel=f"checkpoint size ({unit})", ylabel="")
        if data["num_weights"].nunique() == 1:
            factor = 8 * scale / data["num_weights"].iloc[0]
            above = axis.secondary_xaxis("top", functions=(lambda s, f=factor: s * f, lambda b, f=factor: b / f))
            above.set_xlabel("bits per weight, everything counted", fontsize=9)
            above.spines["top"].set_visible(True)
        if len(ends) <= 12:
            _label_ends(axis, ends)
    if len(styles) > 12:
        _legend(figure, styles, lines=True)
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
            error = increase([run], [reference], domains)[1] if reference else np.nan
            row = {"text": title, "series": run.series, "run": run.name, "target": run.target, "seed": run.seed}
            row |= {"is_reference": run.is_reference, "checkpoint_bytes": run.checkpoint_bytes}
            row |= {"num_weights": run.num_weights, "ppl": np.exp(nll), "paired_stderr": np.exp(nll) * error}
            found.append(row)
    return found


def _named(title: str, domains: list[str]) -> str:
    return f"{title} ({', '.join(domains)})" if len(domains) < 3 else f"mean over {len(domains)} {title}"


def _label_ends(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of the panel, at its last point's height, pushed apart where they would overlap."""
    axis.figure.canvas.draw()
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
            (1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 2, "shrinkB": 5},
        )


def _legend(figure: Figure, styles: dict[str, dict], lines: bool) -> None:
    keep = ("color", "marker", "markerfacecolor", "linestyle") if lines else ("color", "marker", "markerfacecolor")
    handles = [
        plt.Line2D([], [], label=shorten(series), **{key: style[key] for key in keep})
        for series, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), handlelength=3)


def selection_shift(runs: list[Run]) -> Drawn:
    """Share of selected slots that differ from the 16-bit model's, by layer; a panel for each size."""
    found = []
    for run in runs:
        domains = run.metrics["domains"].values()
        if run.is_reference or not all("selection_shift_by_layer" in domain for domain in domains):
            continue
        by_layer = np.average(
            [domain["selection_shift_by_layer"] for domain in domains],
            axis=0,
            weights=[d["num_blocks"] for d in domains],
        )
        row = {"target": run.target, "series": run.series, "run": run.name}
        found += [row | {"layer": layer, "selection_shift": value} for layer, value in enumerate(by_layer)]
    if not found:
        return None
    data, styles = pd.DataFrame(found), series_styles(runs)
    figure, panels = _grid(list(dict.fromkeys(data["target"])), width=4.2, height=3.4)
    for target, axis in panels.items():
        for (series, _), rows in data[data["target"] == target].groupby(["series", "run"], sort=False):
            few = len(rows) <= 32
            style = styles[series] if few else {**styles[series], "marker": "none"}
            axis.plot(rows["layer"], 100 * rows["selection_shift"], **style)
        axis.set(title=target, xlabel="layer")
        axis.set_ylim(bottom=0)
        _whole_numbers(axis, rows["layer"])
    next(iter(panels.values())).set_ylabel("changed selections (%)")
    _legend(figure, {series: styles[series] for series in dict.fromkeys(data["series"])}, lines=True)
    return figure, data


def speed(runs: list[Run]) -> Drawn:
    """Prefill and decode against the 16-bit model in the same process: medians, and the middle half of the repeats."""
    found = []
    for run in runs:
        for phase in ("prefill", "decode") if not run.is_reference else ():
            own, base = run.latency[f"{phase}_ms"], run.latency[f"{phase}_ms_16bit"]["median"]
            row = {"run": run.name, "title": run.title, "series": run.series, "phase": phase}
            row |= {"milliseconds": own["median"], "milliseconds_16bit": base, "speedup": base / own["median"]}
            found.append(row | {"low": base / own["q3"], "high": base / own["q1"], "device": run.latency["device"]})
    if not found:
        return None
    data, styles = pd.DataFrame(found), series_styles(runs)
    names = list(dict.fromkeys(data["run"]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.5 + 0.32 * len(names)), sharey=True)
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
    for run in runs:
        if run.quantization["method"] != "qesc" or run.is_pruned or run.artefacts["quantization"] in seen:
            continue
        seen.add(run.artefacts["quantization"])
        for layer in run.diagnostics:
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
        axis.set_ylim(bottom=0)
        _whole_numbers(axis, rows["layer"])
    next(iter(panels.values())).set_ylabel("changed selections (%)")
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
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(names) - columns) : len(names)]:
        axis.tick_params(labelbottom=True)
    return figure, dict(zip(names, axes.flat, strict=False))


def _whole_numbers(axis, values) -> None:
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(min(values) - 0.3, max(values) + 0.3)


@dataclass(frozen=True)
class Entry:
    """A figure of the report: how it is drawn, its heading, and how to read it."""

    draw: Callable[[list[Run]], Drawn]
    title: str
    caption: str


FIGURES = {
    "quality": Entry(
        quality,
        "Quality against size",
        "Lower and further left is better. Each line is one method, its points are the sizes; colours tell the quantization "
        "method, dashes and diamonds a mixed-precision allocation, hollow marks pruning. Several domains are joined by the "
        "geometric mean. The dashed level is the 16-bit model. Bars are one standard error of the difference to that level "
        "on the same blocks of text: they say how sure the distance is, not how hard the text is.",
    ),
    "selection_shift": Entry(
        selection_shift,
        "Selection shift by layer",
        "Share of expert selections on the test text that differ from those of the 16-bit model, before any pruning. "
        "Lower is better; errors of early layers reach the later ones.",
    ),
    "router_fit": Entry(
        router_fit,
        "What router calibration repairs",
        "Changed selections on the calibration text at the moment a layer is quantized: with the router as it was, and "
        "after QESC has fitted it to the quantized hidden states. The shaded area is what the fit wins back.",
    ),
    "bits": Entry(
        heatmaps.bits,
        "Bits by layer and expert",
        "How mixed precision spends its bits. The first panel shows how often each expert is selected on the calibration "
        "text, as a multiple of the even share; the others the width that each expert got. The rank correlation in a title "
        "says how closely the widths follow the frequencies (1 the same order, 0 none).",
    ),
    "expert_use": Entry(
        heatmaps.expert_use,
        "Expert use by domain",
        "Share of each domain's selections on the test text that go to every expert of the 16-bit model: rows sum to 100 %. "
        "Mutual information says how much an expert tells of the domain, over the domains of the corpus counted alike; "
        "0 means that experts do not specialise.",
    ),
    "speed": Entry(
        speed,
        "Speed",
        "Medians against the 16-bit model, timed in turn with it in one process; the bars hold the middle half of the "
        "repeats. Right of the dashed line is faster.",
    ),
}


def draw_all(runs: list[Run], folder: Path) -> list[str]:
    """Draw every figure that the runs have something to show for into `folder`; returns their names."""
    names = []
    with plt.rc_context(RC):
        for name, entry in FIGURES.items():
            if drawn := entry.draw(runs):
                save(*drawn, folder, name)
                names.append(name)
    return names
