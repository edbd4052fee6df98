"""Perplexity by domain, the experts that were selected on the way, and how they differ from the 16-bit model's.

Legend: N blocks, S positions, L MoE layers, K selected experts, E experts, V vocabulary.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.pruning.policy import experts_of


@dataclass
class Measured:
    """nll_N: mean negative log-likelihood (nats) of each block. selected_NSLK: the routers' choices, before any pruning.
    active: routed slots that were computed, as a share of all."""

    nll_N: np.ndarray
    selected_NSLK: np.ndarray
    active: float


@dataclass
class SelectionTap:
    """Records what reaches the experts during forwards."""

    selected: list[torch.Tensor] = field(default_factory=list)

    def watch(self, model) -> list:
        def keep(_, args):
            self.selected.append(args[1])

        return [experts.register_forward_pre_hook(keep) for experts in experts_of(model)]

    def take(self) -> torch.Tensor:
        """What the last forward selected, `[L, T, K]`."""
        found, self.selected = torch.stack(self.selected), []
        return found


@torch.inference_mode()
def measure(
    model, num_experts: int, before: SelectionTap, after: SelectionTap, blocks_NS: np.ndarray, batch_size: int, progress
) -> Measured:
    """Run the blocks through the model. before, after: taps on its experts ahead of and behind the pruning hooks."""
    nll, selected, active, slots = [], [], 0, 0
    for start in range(0, len(blocks_NS), batch_size):
        ids_BS = torch.from_numpy(blocks_NS[start : start + batch_size]).to(model.device)
        logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none")
        nll += losses.view(len(ids_BS), -1).mean(1).tolist()
        chosen_LTK, kept_LTK = before.take(), after.take()
        active += int((kept_LTK < num_experts).sum())
        slots += kept_LTK.numel()
        per_block = chosen_LTK.unflatten(1, ids_BS.shape).permute(1, 2, 0, 3)
        selected.append(per_block.cpu().numpy().astype(_index_dtype(num_experts)))
        progress.update(len(ids_BS))
    # contiguous, for safetensors writes an array's memory as it lies
    return Measured(np.asarray(nll), np.ascontiguousarray(np.concatenate(selected)), active / slots)


def run_layers(stream: ModelStream, ids_NS: torch.Tensor, folder: Path, progress, keep=lambda *_: None) -> torch.Tensor:
    """What leaves the last layer, `[N, S, H]`, in a file below `folder`, which is the caller's to drop.

    keep: called with each layer's index, module and MoE block's input. progress: counts layers.
    """
    streams = Streams(folder, ("x",), (*ids_NS.shape, stream.shape.hidden_size))
    if streams.layer == 0:
        stream.embed(ids_NS, streams["x"])
    progress.update(streams.layer)
    for index, layer in stream.layers(streams.layer):
        m = streams.scratch("m")
        stream.attend(index, layer, streams["x"], streams.next("x"), m)
        keep(index, layer, m)
        stream.add_block(layer, streams.next("x"), m)
        streams.advance()
        progress.update()
    return streams["x"]


@torch.inference_mode()
def measure_streamed(stream: ModelStream, blocks_NS: np.ndarray, folder: Path, progress) -> Measured:
    """The same for a 16-bit model that does not fit in memory: all blocks go through it a layer at a time.

    folder: where the hidden states live meanwhile; what was killed goes on from its last whole layer. progress: counts layers.
    """
    ids_NS = torch.from_numpy(blocks_NS)

    def keep(index, layer, m_NSH):
        if index in stream.shape.moe_layers:
            np.save(folder / f"selected-{index}.npy", stream.route(layer, m_NSH).indices.unflatten(0, ids_NS.shape).numpy())

    x_NSH = run_layers(stream, ids_NS, folder, progress, keep)
    nll = []
    for ids_S, x_SH in zip(ids_NS, x_NSH, strict=True):
        logits_SV = stream.logits(x_SH[None])[0, :-1].float()
        nll.append(torch.nn.functional.cross_entropy(logits_SV, ids_S[1:].to(logits_SV.device)).item())
    chosen = np.stack([np.load(folder / f"selected-{index}.npy") for index in stream.shape.moe_layers], axis=2)
    return Measured(np.asarray(nll), chosen.astype(_index_dtype(stream.shape.num_experts)), 1.0)


def _index_dtype(num_experts: int):
    return np.uint8 if num_experts <= 256 else np.int16


def perplexity(nll_N: np.ndarray) -> tuple[float, float]:
    """`exp(mean nll)` and its standard error over blocks (delta method; 0 for a single block)."""
    mean = float(np.mean(nll_N))
    error = float(np.std(nll_N, ddof=1) / np.sqrt(len(nll_N))) if len(nll_N) > 1 else 0.0
    return float(np.exp(mean)), float(np.exp(mean)) * error


def selection_shift(reference_NSLK: np.ndarray, selected_NSLK: np.ndarray) -> np.ndarray:
    """Share of selected slots that changed, `1 - |S & S16| / k`, mean over positions: `[N, L]`."""
    kept = (reference_NSLK[..., :, None] == selected_NSLK[..., None, :]).any(-1).mean(-1)
    return 1 - kept.mean(1)


def expert_use(selected_NSLK: np.ndarray, num_experts: int) -> list[list[float]]:
    """Share of each layer's selections that every expert takes, `[L][E]`."""
    counts = [np.bincount(selected_NSLK[:, :, layer].ravel(), minlength=num_experts) for layer in range(selected_NSLK.shape[2])]
    return [(count / count.sum()).tolist() for count in counts]
