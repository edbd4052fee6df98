"""How figures look, and how they are written: the same bytes for the same numbers."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moepress.report.run import Run

RC: dict = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "svg.hashsalt": "moepress",
    "svg.fonttype": "path",
    "text.parse_math": False,
}

# Okabe and Ito's palette, which the colour-blind can tell apart.
METHOD_COLOURS = {"none": "#4d4d4d", "rtn": "#009e73", "gptq": "#0072b2", "qesc": "#d55e00"}
METHOD_COLOURS |= {"gptq_minmax": "#56b4e9", "gptq_mc": "#e69f00", "fast": "#7a5195", "best": "#cc79a7"}
OTHER_COLOURS = ("#8c6d31", "#1b7837", "#a50f15", "#525252", "#88419d", "#3690c0", "#f16913", "#000000")
ALLOCATION_STYLES = {
    "uniform": ("o", "-"),
    "pmq": ("D", (0, (4, 1.5))),
    "pmq_code": ("d", (0, (4, 1.5, 1, 1.5))),
    "global": ("H", (0, (7, 1.5))),
    "half": (">", (0, (2, 2))),
    "random": ("s", (0, (1, 3))),
    "frequency": ("<", (0, (3, 3))),
    "weight": ("8", (0, (5, 3))),
    "hessian": ("^", (0, (5, 1.5, 1, 1.5, 1, 1.5))),
    "bsp": ("v", (0, (1, 2, 4, 2))),
}
OTHER_STYLES = (("s", (0, (1, 1.2))), ("^", (0, (6, 1, 1, 1))), ("v", (0, (3, 1, 1, 1, 1, 1))))
MARKERS = tuple(marker for marker, _ in ALLOCATION_STYLES.values())
PRUNED_MARKERS = ("P", "X", "*", "p", "h")
INK, MUTED = "#222222", "#767676"


def series_styles(runs: list[Run]) -> dict[str, dict]:
    """Series -> colour (its quantization's, by name), marker and line (its allocation's); pruned series have hollow
    markers of their own. A series that would look like one before it takes a colour that is left, or else a
    marker."""
    styles, taken, colours = {}, set(), list(OTHER_COLOURS)
    allocations, methods = dict(ALLOCATION_STYLES), dict(METHOD_COLOURS)
    pruned = 0
    for run in sorted(runs, key=lambda run: len(run.extras)):
        if run.series in styles or run.is_reference:
            continue
        allocation = run.allocation["method"] if run.is_quantized else "uniform"
        if run.method not in methods:
            methods[run.method] = colours.pop(0) if colours else MUTED
        if allocation not in allocations:
            allocations[allocation] = OTHER_STYLES[(len(allocations) - len(ALLOCATION_STYLES)) % len(OTHER_STYLES)]
        colour, (marker, line) = methods[run.method], allocations[allocation]
        if run.is_pruned:
            marker, line, pruned = PRUNED_MARKERS[pruned % len(PRUNED_MARKERS)], ":", pruned + 1
        markers = PRUNED_MARKERS if run.is_pruned else MARKERS
        looks = [(colour, marker), *((other, marker) for other in colours)]
        looks += [(other, shape) for shape in markers for other in (colour, *OTHER_COLOURS)]
        colour, marker = next((look for look in looks if (*look, line) not in taken), looks[0])
        colours = [other for other in colours if other != colour]
        taken.add((colour, marker, line))
        face = "white" if run.is_pruned else colour
        styles[run.series] = {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": face}
    return styles


def shorten(text: str, length: int = 34) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def save(figure: Figure, data: pd.DataFrame, folder: Path, name: str) -> None:
    """Write `name`.png, .svg and .csv (the numbers shown) without dates or versions in them."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.set_layout_engine("none")  # the places that the first drawing found hold for the second
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    data.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
