"""Heat maps over experts, few or hundreds: the bits they get, how often they are selected, and by which text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moepress.models.specialisation import mutual_information
from moepress.report.reading import first_seeds
from moepress.report.run import Run, label
from moepress.report.style import INK, plt, shorten

BIT_COLOURS = {1: "#f0efe6", 2: "#a9d6c5", 3: "#4fa3b5", 4: "#1f5f99", 8: "#142a4f"}
MOST_NUMBERS = 128
"""Cells of a map that still have their number in them."""
MOST_LAYERS = 8
"""Layers shown of expert use; the CSV has all."""


def bits(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """Width of every expert of every layer, a panel for each mixed-precision allocation, beside selection frequency."""
    mixed: dict[str, list[Run]] = {}
    for run in sorted(first_seeds(runs), key=lambda run: run.width):
        if run.is_mixed:
            mixed.setdefault(run.artefacts["allocation"], []).append(run)
    if not mixed:
        return None
    counted = next((run for group in mixed.values() for run in group if "statistics" in run.artefacts), None)
    panels, frames = [], []
    relative_LE = None
    if counted:
        frequency_LE = np.array([layer["frequency"] for layer in counted.statistics["layers"]])
        relative_LE = frequency_LE / frequency_LE.mean(1, keepdims=True)
    for group in mixed.values():
        bits_LE = np.array(group[0].bits)
        methods = ", ".join(dict.fromkeys(label(run.method) for run in group))
        title = f"{label(group[0].allocation['method'])}, {group[0].target} ({methods})"
        frame = _tidy(bits_LE, "bits", group[0].shape.moe_layers).assign(allocation=title)
        if relative_LE is not None and relative_LE.shape == bits_LE.shape:
            frame["frequency"] = frequency_LE.ravel()
            ranks = [pd.Series(values.ravel()).rank() for values in (bits_LE, relative_LE)]
            title += f"\nrank correlation with frequency {ranks[0].corr(ranks[1]):.2f}"
        frames.append(frame)
        panels.append((title, bits_LE))

    layers, experts = panels[0][1].shape
    columns = min(4 if experts <= 16 else 2 if experts <= 64 else 1, len(panels) + (relative_LE is not None))
    lines = -(-(len(panels) + (relative_LE is not None)) // columns)
    height = min(max(1.3 + 0.3 * layers, 2.0), 5.0 if experts <= 64 else 3.4)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(12 / columns, 3.1) * columns, height * lines + 0.5), sharey=True, squeeze=False
    )
    slots = list(axes.flat)
    for axis in slots[len(panels) + (relative_LE is not None) :]:
        axis.set_visible(False)
    if relative_LE is not None:
        axis = slots.pop(0)
        image = mesh(axis, relative_LE, cmap="Oranges", vmin=0, vmax=max(2.0, relative_LE.max()))
        axis.set_title("selection frequency\n(even share = 1)")
        figure.colorbar(image, ax=axis, pad=0.02, aspect=16).outline.set_visible(False)
    widths = sorted({int(width) for _, values in panels for width in values.ravel()})
    for axis, (title, bits_LE) in zip(slots, panels, strict=False):
        _bits_panel(axis, title, bits_LE, widths)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
        _name_layers(axis, next(iter(mixed.values()))[0].shape.moe_layers)
    for axis in axes.flat[-columns:]:
        axis.set_xlabel("expert")
    patches = [
        plt.Rectangle((0, 0), 1, 1, facecolor=BIT_COLOURS.get(width, "#000000"), edgecolor="#bbbbbb", linewidth=0.5)
        for width in widths
    ]
    names = [f"{width} bit" + ("s" if width > 1 else "") for width in widths]
    figure.legend(patches, names, loc="outside lower center", ncols=len(widths), handlelength=1.2)
    return figure, pd.concat(frames, ignore_index=True)


def allocation(title: str, bits_LE: Sequence[Sequence[int]], layers: tuple[int, ...]) -> Figure:
    """The widths of one allocation's experts. layers: the numbers of the rows."""
    bits_LE = np.array(bits_LE)
    rows, experts = bits_LE.shape
    size = (min(max(1.2 + 0.3 * experts, 3.4), 9), min(max(1.2 + 0.3 * rows, 2.0), 8))
    figure, axis = plt.subplots(figsize=size)
    _bits_panel(axis, title, bits_LE, sorted({int(width) for width in bits_LE.ravel()}))
    axis.set(xlabel="expert", ylabel="layer")
    _name_layers(axis, layers)
    return figure


def _bits_panel(axis, title: str, bits_LE: np.ndarray, widths: list[int]) -> None:
    """widths: those that occur in any panel of the figure."""
    colours = ListedColormap([BIT_COLOURS.get(width, "#000000") for width in widths])
    norm = BoundaryNorm([widths[0] - 0.5, *(width + 0.5 for width in widths)], len(widths))
    mesh(axis, bits_LE, cmap=colours, norm=norm)
    axis.set_title(title)
    if bits_LE.size <= MOST_NUMBERS:
        for (layer, expert), width in np.ndenumerate(bits_LE):
            axis.text(expert, layer, str(width), ha="center", va="center", fontsize=9, color=INK if width < 3 else "white")


def sensitivity(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """MC's eps of every expert, a panel for each width that the statistics measured, relative to the mean at 2 bits."""
    run = next((run for run in runs if "statistics" in run.artefacts and "errors" in run.statistics["layers"][0]), None)
    if run is None:
        return None
    widths = run.statistics["widths"]
    errors_LEW = np.array([layer["errors"] for layer in run.statistics["layers"]])
    unit = errors_LEW[..., min(range(len(widths)), key=lambda i: abs(widths[i] - 2))].mean()
    relative_LEW = np.maximum(errors_LEW / unit, 1e-4)  # an expert without tokens moves nothing
    layers, experts, _ = errors_LEW.shape
    columns = min(4 if experts <= 16 else 2 if experts <= 64 else 1, len(widths))
    lines = -(-len(widths) // columns)
    height = min(max(1.3 + 0.3 * layers, 2.0), 5.0 if experts <= 64 else 3.4)
    size = (1.2 + max(11 / columns, 2.7) * columns, height * lines + 0.4)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    norm = LogNorm(max(relative_LEW.min(), 0.01), relative_LEW.max())
    for index, axis in enumerate(axes.flat[: len(widths)]):
        image = mesh(axis, relative_LEW[..., index], cmap="Purples", norm=norm)
        share = relative_LEW[..., index].mean()
        axis.set_title(f"{widths[index]} bit{'s' if widths[index] > 1 else ''}: {share:.2g} on average")
    for axis in axes.flat[len(widths) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
        _name_layers(axis, run.shape.moe_layers)
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=14 * lines)
    bar.set_label("error (mean at 2 bits = 1)")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    frames = [
        _tidy(errors_LEW[..., i], "error", run.shape.moe_layers).assign(bits=width, relative=errors_LEW[..., i].ravel() / unit)
        for i, width in enumerate(widths)
    ]
    return figure, pd.concat(frames, ignore_index=True)


def expert_use(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """Share of each domain's selections that every expert takes, a panel for each of at most `MOST_LAYERS` layers."""
    run = next((run for run in runs if run.is_reference), runs[0])
    inside, outside = run.domains
    domains = inside + outside
    use_DLE = np.array([run.metrics["domains"][domain]["expert_use"] for domain in domains])
    _, layers, experts = use_DLE.shape
    information = [mutual_information(use_DLE[: len(inside), layer]) for layer in range(layers)]
    shown = sorted({int(layer) for layer in np.linspace(0, layers - 1, min(layers, MOST_LAYERS)).round()})

    columns = min(len(shown), 4 if experts <= 16 else 2 if experts <= 64 else 1)
    lines = -(-len(shown) // columns)
    size = (1.4 + max(11 / columns, 2.7) * columns, (0.95 + max(0.27 * len(domains), 0.6)) * lines + 0.4)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, layer in zip(axes.flat, shown, strict=False):
        image = mesh(axis, 100 * use_DLE[:, layer], cmap="Blues", vmin=0, vmax=100 * use_DLE.max())
        told = f": {information[layer]:.2f} bit" if len(inside) > 1 else ""  # one domain tells nothing of domains
        axis.set_title(f"layer {run.shape.moe_layers[layer]}{told}")
        axis.set_yticks(range(len(domains)), [shorten(domain, 22) for domain in domains])
        if inside and outside:
            axis.axhline(len(inside) - 0.5, color=INK, linewidth=1)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=25 * lines)
    bar.set_label("share of the domain's selections (%)")
    bar.outline.set_visible(False)
    frames = []
    for index, domain in enumerate(domains):
        frame = _tidy(use_DLE[index], "share", run.shape.moe_layers).assign(domain=domain, out_of_domain=domain in outside)
        frames.append(frame.assign(mutual_information=np.repeat(information, experts)))
    return figure, pd.concat(frames, ignore_index=True)


def mesh(axis, values: np.ndarray, **options):
    """Cells of a matrix, the first row on top; drawn as an image where they are many."""
    few = values.size <= 600
    edges = {"edgecolors": "white", "linewidth": 0.8} if few else {"rasterized": True}
    rows, columns = values.shape
    mesh = axis.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, **edges, **options)
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=min(columns, 16), min_n_ticks=1))
    axis.yaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=min(rows, 12), min_n_ticks=1))
    return mesh


def _name_layers(axis, layers: tuple[int, ...]) -> None:
    """Rows are the MoE layers; dense ones before them shift their numbers."""
    if layers[0] > 0 or layers[-1] != len(layers) - 1:
        axis.yaxis.set_major_formatter(lambda row, _: str(layers[int(row)]) if 0 <= row < len(layers) else "")


def _tidy(values_LE: np.ndarray, name: str, layers: tuple[int, ...]) -> pd.DataFrame:
    """One row per MoE layer and expert; layers: their numbers."""
    layer, expert = np.indices(values_LE.shape)
    return pd.DataFrame({"layer": np.asarray(layers)[layer.ravel()], "expert": expert.ravel(), name: values_LE.ravel()})
