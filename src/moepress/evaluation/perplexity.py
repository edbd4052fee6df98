"""Perplexity by domain, the experts that were selected on the way, and how they differ from the 16-bit model's.

Legend: N blocks, S positions, L MoE layers, K selected experts, E experts, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

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
        selected.append(per_block.to(torch.uint8 if num_experts <= 256 else torch.int16).cpu().numpy())
        progress.update(len(ids_BS))
    # contiguous, for safetensors writes an array's memory as it lies
    return Measured(np.asarray(nll), np.ascontiguousarray(np.concatenate(selected)), active / slots)


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
