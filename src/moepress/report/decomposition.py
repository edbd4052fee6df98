"""The figure of the shift's and the weights' own cost. Like those in `lines`: runs -> a figure with its numbers, or None."""

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from moepress.report.paired import NOTHING, Difference, difference
from moepress.report.reading import methods, reference_of
from moepress.report.run import Run
from moepress.report.style import INK, plt, series_styles, shorten

PARTS = {
    "shift_only": ("selection shift only", "#56b4e9", "o"),
    "weights_only": ("weight error only", "#e69f00", "s"),
    "both": ("both: the quantized model", "#4d4d4d", "D"),
}
"""Column of a decomposition's blocks -> its name, colour and marker."""


def part_increase(runs: list[Run], reference: Run | None, part: str, domains: list[str]) -> Difference:
    """Mean nll of a part above that of the 16-bit model, in nats per token; see `paired.difference`."""

    def nll(run: Run) -> dict[str, np.ndarray]:
        if run.is_reference:
            return {domain: run.nll[domain] for domain in domains}
        assert run.decomposition is not None
        own = run.decomposition.groupby("domain")[part]
        return {domain: own.get_group(domain).to_numpy() for domain in domains}

    return difference(runs, [reference], nll) if reference else NOTHING


def columns(run: Run, reference: Run | None) -> dict[str, float]:
    """Of runs.csv: delta_nll of each part alone, with its standard error; nan for a run that was not decomposed."""
    found: dict[str, float] = {}
    for part in ("shift_only", "weights_only"):
        above = NOTHING if run.decomposition is None else part_increase([run], reference, part, run.domains[0])
        found |= {f"delta_nll_{part}": above.value, f"delta_nll_{part}_stderr": above.stderr}
    return found


def decomposition(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """What the shifted selections cost alone, what the weights' error costs alone, and both; and the overlap by layer."""
    found = methods(run for run in runs if run.decomposition is not None)
    groups = {(members[0].series, members[0].target): members for members in found}
    if not groups:
        return None
    inside, outside = next(iter(groups.values()))[0].domains
    texts = {"perplexity, corpus (%)": inside} | ({"perplexity, out of domain (%)": outside} if outside else {})
    size = (3.2 + 3.1 * len(texts) + 3.4, max(2.6, 1.5 + 0.5 * len(groups)))
    figure, axes = plt.subplots(1, len(texts) + 1, figsize=size)
    rows = []
    for axis, (title, domains) in zip(axes, texts.items(), strict=False):
        axis.axvline(0, color=INK, linewidth=1)
        for place, ((series, target), members) in enumerate(groups.items()):
            reference = reference_of(members[0], runs)
            for offset, (part, (_, colour, marker)) in zip((-0.22, 0, 0.22), PARTS.items(), strict=True):
                one = part_increase(members, reference, part, domains)
                percent, ends = 100 * np.expm1(one.value), 100 * np.expm1(np.array(one.interval))
                axis.plot(ends, [place + offset] * 2, color=colour, linewidth=2)
                axis.plot([percent], [place + offset], marker, color=colour, markersize=5)
                row = {"series": series, "target": target, "text": title, "part": part, "delta_nll": one.value}
                rows.append(row | {"stderr": one.stderr, "low": one.interval[0], "high": one.interval[1]})
        axis.set(title=title, ylim=(len(groups) - 0.5, -0.5), yticks=range(len(groups)), yticklabels=[])
        axis.grid(axis="y", visible=False)
    axes[0].set_yticklabels([shorten(f"{series}, {target}", 44) for series, target in groups])

    styles, layers = series_styles(runs), next(iter(groups.values()))[0].shape.moe_layers
    for text, (series, _) in zip(axes[0].get_yticklabels(), groups, strict=True):
        text.set_color(styles[series]["color"])  # the names of the lines beside them, too
    for (series, target), members in groups.items():
        overlap_L = np.mean([one["topk_overlap"] for run in members for one in run.overlap.values()], axis=0)
        same_L = np.mean([one["same_selection"] for run in members for one in run.overlap.values()], axis=0)
        style = styles[series] if len(layers) <= 32 else {**styles[series], "marker": "none"}
        axes[-1].plot(layers, 100 * overlap_L, **style)
        for layer, overlap, same in zip(layers, overlap_L, same_L, strict=True):
            row = {"series": series, "target": target, "layer": layer}
            rows.append(row | {"topk_overlap": overlap, "same_selection": same})
    axes[-1].set(title="top-k overlap with 16 bits (%)", xlabel="layer")
    axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    marks = [plt.Line2D([], [], color=c, marker=m, linewidth=2, label=name) for name, c, m in PARTS.values()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure, pd.DataFrame(rows)
