"""Perplexity by domain, the experts that were selected on the way, and how they differ from the 16-bit model's.

Legend: N blocks, S positions, L MoE layers, K selected experts, E experts, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moepress.evaluation.decomposition import Forced
from moepress.evaluation.usage import Usage, count, kept_slots, watched
from moepress.models.streaming import ModelStream
from moepress.models.streams import run_layers


@dataclass
class Measured:
    """nll_N: mean negative log-likelihood (nats) of each block's scored tokens. selected_NSLK: the routers' choices,
    before a policy drops any of them; under static removal those among the experts that remain. usage: which experts the blocks
    choose and compute."""

    nll_N: np.ndarray
    selected_NSLK: np.ndarray
    usage: Usage


def num_scored(seq_len: int, stride: int | None) -> int:
    """Tokens at each block's end that its likelihood is taken of: all that have one before them, or the `stride` new ones."""
    return min(stride or seq_len, seq_len - 1)


@torch.inference_mode()
def measure(model, num_experts: int, blocks_NS: np.ndarray, batch_size: int, stride: int | None, progress) -> Measured:
    """Run the blocks through the model, with its pruning policy where it has one. stride: see `num_scored`."""
    nll, selected, usage, scored = [], [], Usage(), num_scored(blocks_NS.shape[1], stride)
    with watched(model) as (chosen, kept):
        for start in range(0, len(blocks_NS), batch_size):
            ids_BS = torch.from_numpy(blocks_NS[start : start + batch_size]).to(model.device)
            logits = model(input_ids=ids_BS, use_cache=False).logits[:, -scored - 1 : -1].float()
            targets = ids_BS[:, -scored:]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            nll += losses.view(len(ids_BS), -1).mean(1).tolist()
            chosen_LTK, kept_LTK = torch.stack(chosen), torch.stack(kept)
            chosen.clear(), kept.clear()
            usage.add(*(count(slots, len(ids_BS), num_experts) for slots in (chosen_LTK, kept_LTK)))
            per_block = chosen_LTK.unflatten(1, ids_BS.shape).permute(1, 2, 0, 3)
            selected.append(per_block.cpu().numpy().astype(_index_dtype(num_experts)))
            progress.update(len(ids_BS))
    # contiguous, for safetensors writes an array's memory as it lies
    return Measured(np.asarray(nll), np.ascontiguousarray(np.concatenate(selected)), usage)


@torch.inference_mode()
def measure_streamed(
    stream: ModelStream, blocks_NS: np.ndarray, stride: int | None, folder: Path, progress, forced: Forced | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same `(nll_N, selected_NSLK)` for a 16-bit model that does not fit in memory: all blocks, a layer at a time.

    folder: where the hidden states live meanwhile; what was killed goes on from its last whole layer. progress: counts layers.
    forced: what its routers are to select instead.
    """
    ids_NS, scored = torch.from_numpy(blocks_NS), num_scored(blocks_NS.shape[1], stride)

    def keep(index, layer, m_NSH):
        if index not in stream.shape.moe_layers:
            return
        if forced is None:
            np.save(folder / f"selected-{index}.npy", stream.route(layer, m_NSH).indices.unflatten(0, ids_NS.shape).numpy())
        else:
            forced.attach(layer.get_submodule(stream.family.router_path), stream.shape.moe_layers.index(index))

    with forced or nullcontext():
        x_NSH = run_layers(stream, ids_NS, folder, progress, keep)
    nll = []
    for ids_S, x_SH in zip(ids_NS, x_NSH, strict=True):
        logits_SV = stream.logits(x_SH[None, -scored - 1 : -1])[0].float()
        nll.append(torch.nn.functional.cross_entropy(logits_SV, ids_S[-scored:].to(logits_SV.device)).item())
    if forced is not None:
        return np.asarray(nll), forced.selected_NSLK
    chosen = np.stack(
        [np.load(folder / f"selected-{index}.npy", allow_pickle=False) for index in stream.shape.moe_layers], axis=2
    )
    return np.asarray(nll), chosen.astype(_index_dtype(stream.shape.num_experts))


def _index_dtype(num_experts: int):
    return np.uint8 if num_experts <= 256 else np.int16


def perplexity(nll_N: np.ndarray) -> tuple[float, float]:
    """`exp(mean nll)` and its standard error over blocks (delta method; 0 for a single block)."""
    mean = float(np.mean(nll_N))
    error = float(np.std(nll_N, ddof=1) / np.sqrt(len(nll_N))) if len(nll_N) > 1 else 0.0
    return float(np.exp(mean)), float(np.exp(mean)) * error


def selection_shift(reference_NSLK: np.ndarray, selected_NSLK: np.ndarray) -> np.ndarray:
    """Share of selected slots that changed, `1 - |S & S16| / k`, mean over positions: `[N, L]`."""
    return 1 - kept_slots(reference_NSLK, selected_NSLK).mean(-1).mean(1)
