"""The figure of the paired comparisons. Like those in `lines`: runs -> a figure with its numbers, or None."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moepress.report import paired
from moepress.report.run import Run
from moepress.report.style import INK, MUTED, plt, shorten

BETTER, WORSE = "#0072b2", "#d55e00"
PANELS = {
    "nll": "perplexity, corpus (%)",
    "nll_ood": "perplexity, out of domain (%)",
    "acc": "accuracy (points)",
}


def shown(metric: str, values) -> np.ndarray:
    """Differences as people read them: nats per token as percent of perplexity, shares as points."""
    return 100 * np.expm1(values) if metric.startswith("nll") else 100 * np.asarray(values)


def differences(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """Every method against 16 bits and against what it builds on: the paired difference and its 95 % interval."""
    found = paired.pairs(runs)
    if not found:
        return None
    panels = [metric for metric in PANELS if any(not np.isnan(pair.differences[metric].value) for pair in found)]
    names = [shorten(f"{pair.runs[0].title} − {pair.against}", 60) for pair in found]
    beside = max(2.4, 0.08 * max(map(len, names)))  # inches that the names take
    size = (beside + 3.3 * len(panels), 1.2 + 0.25 * len(found))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, metric in zip(axes[0], panels, strict=True):
        axis.axvline(0, color=INK, linewidth=1)
        for place, pair in enumerate(found):
            one = pair.differences[metric]
            if np.isnan(one.value):
                continue
            is_better = one.value > 0 if metric == "acc" else one.value < 0
            colour = MUTED if one.is_noise else BETTER if is_better else WORSE
            axis.plot(shown(metric, one.interval), [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
            face = "white" if one.is_noise else colour
            axis.plot([shown(metric, one.value)], [place], "o", color=colour, markerfacecolor=face, markersize=5)
        axis.set(title=PANELS[metric])
        axis.grid(axis="y", visible=False)
    for axis in axes[0]:
        for place in range(1, len(found)):
            if found[place].step != found[place - 1].step:
                axis.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8)
    axes[0, 0].set_yticks(range(len(found)), names)
    axes[0, 0].set_ylim(len(found) - 0.4, -0.6)
    marks = {"better": (BETTER, BETTER), "worse": (WORSE, WORSE), "within noise": (MUTED, "white")}
    handles = [
        plt.Line2D([], [], color=colour, marker="o", markerfacecolor=face, linewidth=2.2, label=name)
        for name, (colour, face) in marks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, paired.tabulate(found)
