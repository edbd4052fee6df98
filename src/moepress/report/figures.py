"""The figures of a report: how each is drawn, what it is called, and how to read it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from moepress.report import awareness, decomposition, forest, heatmaps, lines, scores, timing
from moepress.report.run import Run
from moepress.report.style import RC, plt, save


@dataclass(frozen=True)
class Entry:
    """draw: runs -> the figure and its numbers, or None where there is nothing to show. title: a heading."""

    draw: Callable[[list[Run]], tuple[Figure, pd.DataFrame] | None]
    title: str
    caption: str


FIGURES = {
    "quality": Entry(
        lines.quality,
        "Quality against size",
        "Lower and further left is better. Each line is one method, its points are the sizes; colours tell the "
        "quantization method, dashes and markers the allocation. Several domains are joined by the "
        "geometric mean; small dots are single calibration samples, larger marks their mean. The dashed level is the 16-bit "
        "model. Bars are one standard error of the difference to that "
        "level on the same blocks of text: how sure the distance is, not how hard the text.",
    ),
    "differences": Entry(
        forest.differences,
        "Paired comparisons",
        "What each method changes against what it builds on, and against 16 bits: the mean difference over the same blocks of "
        "text and the same items, with its 95 % confidence interval. Hollow and grey: within noise. Perplexity is better to "
        "the left, accuracy to the right. With one seed the intervals say nothing about another calibration sample.",
    ),
    "pruning": Entry(
        lines.pruning,
        "Quality against computed experts",
        "Pruning leaves the size as it is and computes fewer experts: lower and further left is better. Bars are one "
        "standard error of the difference to the 16-bit model on the same blocks of text.",
    ),
    "accuracy": Entry(
        scores.accuracy,
        "Accuracy by task",
        "Further right is better. Bars are one standard error over the task's items, which all runs share: two runs differ "
        "more surely than their bars suggest. The dashed line is the 16-bit model, the dotted one is chance. Small models "
        "tell methods apart by perplexity rather than by these.",
    ),
    "selection_shift": Entry(
        lines.selection_shift,
        "Selection shift by layer",
        "Share of expert selections on the test text that differ from those of the 16-bit model: what the routers "
        "choose, before a pruning policy drops any of it. Lower is better; errors of early layers reach the later ones.",
    ),
    "decomposition": Entry(
        decomposition.decomposition,
        "Shifted selections or inexact weights",
        "Change of perplexity from 16 bits, with its 95 % interval, over the same blocks: of the 16-bit model that selects "
        "what the quantized one selects, of the quantized model that selects what the 16-bit one selects, and of the "
        "quantized model as it is (EAC-MoE's decomposition; a forced expert gets the weight that the model's own router gives "
        "it). The overlap is the share of a token's experts that both models select, mean over the domains; names have the "
        "colours of its lines.",
    ),
    "router_fit": Entry(
        lines.router_fit,
        "What router calibration repairs",
        "Changed selections on the calibration text at the moment a layer is quantized: with the router as it was, and "
        "after QESC has fitted it to the quantized hidden states. The shaded area is what the fit wins back.",
    ),
    "sensitivity": Entry(
        heatmaps.sensitivity,
        "Sensitivity of experts by layer",
        "How far the MoE block's output moves, on the calibration text, when one expert alone is quantized: its Frobenius norm "
        "against the mean over all experts at 2 bits (or the width next to it). Darker experts need their bits more; "
        "a panel for each width, on one logarithmic scale.",
    ),
    "bits": Entry(
        heatmaps.bits,
        "Bits by layer and expert",
        "How mixed precision spends its bits. The first panel shows how often each expert is selected on the "
        "calibration text, as a multiple of the even share; the others the width that each expert got. The rank "
        "correlation in a title says how closely the widths follow the frequencies (1 the same order, 0 none).",
    ),
    "expert_use": Entry(
        heatmaps.expert_use,
        "Expert use by domain",
        "Share of each domain's selections on the test text that go to every expert of the 16-bit model: rows sum to "
        "100 %. The number above a layer is the mutual information of domain and expert, over the domains of the "
        "corpus (those above the line, if they are several) counted alike: how much an expert tells of the domain. At 0 bit "
        "experts do not specialise.",
    ),
    "similarity": Entry(
        awareness.similarity,
        "Which texts and tasks use the same experts",
        "Share of their selections that two texts, or tasks, give to the same experts of the 16-bit model (the sum of the "
        "smaller of both shares, mean over layers): at 100 % they use the experts alike. The lines part the domains from the "
        "tasks.",
    ),
    "left_out": Entry(
        awareness.left_out,
        "What pruning leaves out of which task",
        "Share of each text's sequences, or task's requests, in which a pruned model computes nothing with an expert. What one "
        "task does without is not what another does without: why pruning follows the sequence.",
    ),
    "speed": Entry(
        lines.speed,
        "Speed",
        "Medians against the 16-bit model, timed in turn with it in one process; the bars reach from its lower quartile over "
        "the method's upper one to its upper over the lower. Right of the dashed line is faster; where a bar crosses the "
        "line, the middle halves of both times overlap and the difference is within noise.",
    ),
    "latency": Entry(
        timing.latency,
        "Time, and how close it is to the hardware's limit",
        "Above, medians with the middle half of the repeats: of a prefill by the tokens of its batch, of a step of decoding by "
        "the sequences of its batch. Below, what the device would need at the least over what was taken: for the weights and "
        "caches that this text's tokens really read, at the bandwidth measured in the same run, or for the operations at the "
        "measured rate of a matrix product, whichever is longer. 100 % is the limit; a small model may live in a CPU's caches, "
        "which are faster than its memory, and exceed it. Time does not depend on how the weights were found: one run stands "
        "for all of its size, mix of widths and pruning. Transformers' plain experts are timed at the first setting only.",
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
