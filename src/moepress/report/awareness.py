"""Figures of which experts texts and tasks use, and what pruning leaves out of them (EAC-MoE: tasks prefer experts)."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moepress.report.heatmaps import MOST_LAYERS, mesh
from moepress.report.reading import first_seeds
from moepress.report.run import Run
from moepress.report.style import INK, plt, shorten


def usage(run: Run) -> tuple[dict[str, dict], int]:
    """What `moepress.evaluation.usage.Usage.summary` says of the run's domains, then of its tasks; and how many are domains."""
    inside, outside = run.domains
    found = {domain: run.metrics["domains"][domain] for domain in inside + outside}
    tasks = {task: score["usage"] for task, score in run.task_scores.items() if "usage" in score}
    return found | tasks, len(found)


def overlap(use_ULE: np.ndarray) -> np.ndarray:
    """`sum_e min(p_e, q_e)`, mean over layers, `[U, U]`: the share of selections that two texts give to the same experts."""
    return np.minimum(use_ULE[:, None], use_ULE[None]).sum(-1).mean(-1)


def cosine(use_ULE: np.ndarray) -> np.ndarray:
    """Cosine of the vectors of shares, mean over layers, `[U, U]`."""
    unit_ULE = use_ULE / np.linalg.norm(use_ULE, axis=-1, keepdims=True)
    return np.einsum("ale,ble->abl", unit_ULE, unit_ULE).mean(-1)


def similarity(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """How alike texts and tasks use the experts of the 16-bit model."""
    run = next((run for run in runs if run.is_reference), runs[0])
    found, num_domains = usage(run)
    if len(found) < 2:
        return None
    use_ULE = np.array([one["expert_use"] for one in found.values()])
    alike_UU, cosine_UU, names = overlap(use_ULE), cosine(use_ULE), list(found)
    width = 3.0 + 0.5 * len(names)
    figure, axis = plt.subplots(figsize=(width + 1.0, 0.5 * len(names) + 2.2))
    image = mesh(axis, 100 * alike_UU, cmap="Blues", vmin=100 * alike_UU.min() - 5, vmax=100)
    for (row, column), value in np.ndenumerate(alike_UU):
        middle = (alike_UU.min() - 0.05 + 1) / 2
        axis.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color="white" if value > middle else INK
        )
    labels = [shorten(name, 24) for name in names]
    axis.set_yticks(range(len(names)), labels)
    axis.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor")
    if 0 < num_domains < len(names):
        for line in (axis.axhline, axis.axvline):
            line(num_domains - 0.5, color=INK, linewidth=1)
    bar = figure.colorbar(image, ax=axis, pad=0.02, aspect=18)
    bar.set_label("selections in common (%)")
    bar.outline.set_visible(False)
    rows, columns = np.indices(alike_UU.shape)
    data = {"text": np.take(names, rows.ravel()), "other": np.take(names, columns.ravel())}
    return figure, pd.DataFrame({**data, "overlap": alike_UU.ravel(), "cosine": cosine_UU.ravel()})


def left_out(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """In which share of each text's sequences a pruned model computes nothing with an expert: a row of panels for each run."""
    pruned = [run for run in first_seeds(runs) if run.is_pruned]
    if not pruned:
        return None
    _, num_domains = usage(pruned[0])
    names, shape = list(dict.fromkeys(name for run in pruned for name in usage(run)[0])), pruned[0].shape
    num_layers = len(shape.moe_layers)
    shown = sorted({int(layer) for layer in np.linspace(0, num_layers - 1, min(num_layers, MOST_LAYERS // 2)).round()})
    size = (2.2 + 2.5 * len(shown), (1.1 + 0.25 * len(names)) * len(pruned) + 0.4)
    figure, axes = plt.subplots(len(pruned), len(shown), figsize=size, sharex=True, sharey=True, squeeze=False)
    frames = []
    for run, line in zip(pruned, axes, strict=True):
        found, _ = usage(run)
        not_asked = {"left_out": np.full((num_layers, shape.num_experts), np.nan), "active_slots": np.nan}
        asked = [found.get(name, not_asked) for name in names]
        without_ULE = np.array([one["left_out"] for one in asked])
        for axis, layer in zip(line, shown, strict=True):
            image = mesh(axis, 100 * without_ULE[:, layer], cmap="Oranges", vmin=0, vmax=100)
            axis.set_yticks(range(len(names)), [shorten(name, 22) for name in names])
            axis.set_title(f"layer {shape.moe_layers[layer]}", fontsize=9.5)
            if 0 < num_domains < len(names):
                axis.axhline(num_domains - 0.5, color=INK, linewidth=1)
        line[0].set_title(f"{shorten(run.title, 40)}: layer {shape.moe_layers[shown[0]]}", fontsize=9.5)
        place, layer, expert = np.indices(without_ULE.shape)
        numbers = {"layer": np.take(shape.moe_layers, layer.ravel()), "expert": expert.ravel(), "left_out": without_ULE.ravel()}
        active = [one["active_slots"] for one in asked]
        text = {"text": np.take(names, place.ravel()), "active_slots": np.take(active, place.ravel())}
        frames.append(pd.DataFrame({"run": run.name, **text, **numbers}).dropna(subset="left_out"))
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12 * len(pruned))
    bar.set_label("sequences without it (%)")
    bar.outline.set_visible(False)
    return figure, pd.concat(frames, ignore_index=True)
