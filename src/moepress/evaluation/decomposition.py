"""Running a model with the expert selections of another: what the shift of the selections costs alone, and what the error of
the weights costs alone (the motivation of EAC-MoE, arXiv 2508.01625).

The model's own router runs, and gives the forced experts the weights that it would give them had it chosen them. That holds
for every family, because every family's router chooses by one `topk` over the experts' scores (Phi-3.5-MoE's by a `max` for
each slot) and makes its weights of what that returned: here it returns other experts. Where a router chooses among groups of
experts before, all groups are open.

Legend: N blocks, S positions, T tokens of one forward, L MoE layers, K selected experts, E experts.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moepress.evaluation.usage import kept_slots
from moepress.pruning.policy import experts_of, routers_of

TOPK, MAX = (torch.topk, torch.Tensor.topk), (torch.max, torch.Tensor.max)


class Forced(TorchFunctionMode):
    """Inside `with`, the attached routers select what another model selected; forwards come in the order of its tokens."""

    def __init__(self, selected_NSLK: np.ndarray, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.selected_NSLK = selected_NSLK
        self.selected_LTK = torch.from_numpy(selected_NSLK.astype(np.int64)).permute(2, 0, 1, 3).flatten(1, 2)
        self.next_token = [0] * len(self.selected_LTK)
        self.now_TK: torch.Tensor | None = None
        self.slot = 0

    def attach(self, router: nn.Module, layer: int) -> list:
        """The router is that of MoE layer number `layer`; returns the hooks, whose `remove()` ends that."""

        def before(_, args):
            start = self.next_token[layer]
            self.next_token[layer] = end = start + args[0].shape[:-1].numel()
            self.now_TK, self.slot = self.selected_LTK[layer, start:end].to(args[0].device), 0

        def after(_, __, output):
            assert torch.equal(output[2], self.now_TK), "this router does not choose by topk: it cannot be told what to choose"
            self.now_TK = None

        return [router.register_forward_pre_hook(before), router.register_forward_hook(after)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.now_TK is None or func not in TOPK + MAX or not isinstance(result, tuple):
            return result
        scores, chosen_TK = args[0], self.now_TK
        if scores.ndim != 2 or len(scores) != len(chosen_TK):
            return result
        if scores.shape[1] != self.num_experts:  # of groups
            return (scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)) if func in TOPK else result
        if func in MAX:
            chosen_TK, self.slot = chosen_TK[:, self.slot, None], self.slot + 1
        return scores.gather(1, chosen_TK), chosen_TK


@contextmanager
def forced(model, selected_NSLK: np.ndarray):
    """Inside, a loaded model selects what another one selected on the same blocks, batch after batch."""
    mode, routers = Forced(selected_NSLK, experts_of(model)[0].num_experts), routers_of(model)
    hooks = [hook for layer, router in enumerate(routers) for hook in mode.attach(router, layer)]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def topk_overlap(reference_NSLK: np.ndarray, selected_NSLK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By layer: `|S & S16| / k`, mean over tokens, and the share of tokens whose whole selection is the same; `[L]` both."""
    same_NSLK = kept_slots(reference_NSLK, selected_NSLK)
    return same_NSLK.mean((0, 1, 3)), same_NSLK.all(-1).mean((0, 1))
