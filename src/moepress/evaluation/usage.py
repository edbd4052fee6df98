"""Which experts a text's tokens choose, and which ones a pruning policy leaves out of it.

Legend: B sequences, N blocks, S positions, T = B * S tokens, L MoE layers, K selected experts, E experts.
"""

from contextlib import contextmanager

import numpy as np
import torch

from moepress.pruning.policy import experts_of


@contextmanager
def watched(model):
    """Inside, `(chosen, kept)`: what each layer's router selects, `[T, K]`, in the order of the forwards, and what of it is
    computed: E, "no expert", in the place of what a policy drops."""
    chosen, kept = [], []
    hooks = []
    for experts in experts_of(model):
        hooks.append(experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]), prepend=True))
        hooks.append(experts.register_forward_pre_hook(lambda _, args: kept.append(args[1])))
    try:
        yield chosen, kept
    finally:
        for hook in hooks:
            hook.remove()


def count(selected_LTK, num_sequences: int, num_experts: int, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
    """How many slots of each sequence go to each expert, int64 `[B, L, E]` on the CPU.

    selected: a tensor or a list of each layer's. mask: 0 where a position is padding.
    """
    if isinstance(selected_LTK, list):
        selected_LTK = torch.stack(selected_LTK)
    slots_LBSK = selected_LTK.long().unflatten(1, (num_sequences, -1))
    if mask_BS is not None:
        slots_LBSK = slots_LBSK.masked_fill(mask_BS[None, :, :, None].to(slots_LBSK.device) == 0, num_experts)
    slots_LBT = slots_LBSK.flatten(2)
    counts_LBE = slots_LBT.new_zeros(*slots_LBT.shape[:2], num_experts + 1)
    counts_LBE.scatter_add_(2, slots_LBT, torch.ones_like(slots_LBT))
    return counts_LBE[..., :num_experts].transpose(0, 1).cpu()


def kept_slots(reference_NSLK: np.ndarray, selected_NSLK: np.ndarray) -> np.ndarray:
    """Whether each expert that the reference selects is selected still, `[N, S, L, K]`."""
    return (reference_NSLK[..., :, None] == selected_NSLK[..., None, :]).any(-1)


def of_selections(selected_NSLK: np.ndarray, num_experts: int) -> "Usage":
    """The usage of blocks `[N, S, L, K]` that were run without pruning: what is chosen is computed."""
    slots_LTK = torch.from_numpy(selected_NSLK.astype(np.int64)).permute(2, 0, 1, 3).flatten(1, 2)
    counts_NLE = count(slots_LTK, len(selected_NSLK), num_experts)
    usage = Usage()
    usage.add(counts_NLE, counts_NLE)
    return usage


class Usage:
    """Sums over sequences of one text or task."""

    def __init__(self):
        self.num_sequences = 0
        self.chosen_LE = self.kept_LE = self.without_LE = 0

    def add(self, chosen_BLE: torch.Tensor, kept_BLE: torch.Tensor) -> None:
        """Add some sequences: what `count` gives for the routers' choice, and for the part of it that is computed."""
        self.num_sequences += len(chosen_BLE)
        self.chosen_LE = self.chosen_LE + chosen_BLE.sum(0)
        self.kept_LE = self.kept_LE + kept_BLE.sum(0)
        self.without_LE = self.without_LE + (kept_BLE == 0).sum(0)

    def __add__(self, other: "Usage") -> "Usage":
        found = Usage()
        for name, value in vars(self).items():
            setattr(found, name, value + getattr(other, name))
        return found

    def summary(self) -> dict:
        """expert_use: share of each layer's selections that every expert takes, `[L][E]`. left_out: share of the sequences
        that compute no token with it. active_slots: selected slots that are computed, as a share of all."""
        return {
            "num_sequences": self.num_sequences,
            "expert_use": (self.chosen_LE / self.chosen_LE.sum(1, keepdim=True)).tolist(),
            "left_out": (self.without_LE / self.num_sequences).tolist(),
            "active_slots": float(self.kept_LE.sum() / self.chosen_LE.sum()),
        }
