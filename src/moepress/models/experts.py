"""The routed experts of one layer, one at a time: what 16-bit weights from disk and packed weights have in common.

Legend: T tokens, H hidden size, I intermediate size, E experts, K selected experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moepress.models.lowbit import Stored


class Experts(nn.Module):
    """Drop-in for an experts module of transformers; subclasses say what each expert's matrices are.

    original: the module in whose place it comes, of transformers or of this class; it tells the number of experts, the gated
    activation and the biases. Its weights may lie on the meta device.
    """

    num_experts: int
    has_bias: bool
    gate_up_proj_bias: torch.Tensor | None
    down_proj_bias: torch.Tensor | None
    hidden_size: int
    intermediate_size: int
    activate: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, original):
        super().__init__()
        self.num_experts = original.num_experts
        self.has_bias = original.has_bias
        self.gate_up_proj_bias = original.gate_up_proj_bias if original.has_bias else None
        self.down_proj_bias = original.down_proj_bias if original.has_bias else None
        if isinstance(original, Experts):
            self.hidden_size, self.intermediate_size = original.hidden_size, original.intermediate_size
            self.activate = original.activate
        else:
            H, I = original.down_proj.shape[1:]
            self.hidden_size, self.intermediate_size = (I, H) if original.is_transposed else (H, I)
            self.activate = original._apply_gate

    def gate_up_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`[2I, H]`: the gate's and the up projection's rows, in the order that the activation wants."""
        raise NotImplementedError

    def down_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`[H, I]`."""
        raise NotImplementedError

    def hidden(self, expert: int, x_TH: torch.Tensor, gate_up_OH: torch.Tensor | None = None) -> torch.Tensor:
        """The input `[T, I]` of an expert's down projection; with other gate and up weights where they are given."""
        weight = self.gate_up_matrix(expert, x_TH.dtype) if gate_up_OH is None else gate_up_OH
        bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
        return self.activate(linear(x_TH, weight, bias))

    def output(self, expert: int, x_TH: torch.Tensor, gate_up_OH=None, down_HI=None) -> torch.Tensor:
        """What one expert makes of its tokens, `[T, H]`; with other weights where they are given."""
        return self.project(expert, self.hidden(expert, x_TH, gate_up_OH), down_HI)

    def project(self, expert: int, hidden_TI: torch.Tensor, down_HI: torch.Tensor | None = None) -> torch.Tensor:
        """What the down projection makes of its input, `[T, H]`."""
        weight = self.down_matrix(expert, hidden_TI.dtype) if down_HI is None else down_HI
        bias = None if self.down_proj_bias is None else self.down_proj_bias[expert]
        return linear(hidden_TI, weight, bias)

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK) -> torch.Tensor:
        """Weighted sum of the selected experts' outputs `[T, H]`; index E means "no expert" and costs nothing."""
        out_TH = torch.zeros_like(hidden_TH)
        order = top_k_index_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index_TK.reshape(-1), minlength=self.num_experts + 1).tolist()
        tokens = order // top_k_index_TK.shape[1]
        weights = top_k_weights_TK.reshape(-1)[order].to(hidden_TH.dtype)
        output = self.output
        if torch.is_grad_enabled() and hidden_TH.requires_grad:  # no expert's widened weights are kept for its backward
            output = partial(checkpoint, self.output, use_reentrant=False, preserve_rng_state=False)
        start = 0
        for e, count in enumerate(counts[: self.num_experts]):
            if count:
                rows = tokens[start : start + count]
                y = output(e, hidden_TH[rows])
                out_TH.index_add_(0, rows, y * weights[start : start + count, None])
            start += count
        return out_TH


class StoredExperts(Experts):
    """16-bit experts as they lie on disk, one matrix at a time widened to the computation's dtype.

    weights: for each expert its gate-up rows, in one part or two, and its down projection, as tensors or `LowBit`. On CPU
    they stay views of the mapped files, so that what a layer holds in memory is little more than the expert in hand.
    """

    def __init__(self, original, weights: list[tuple[list[Stored], Stored]], device: str):
        super().__init__(original)
        self.device = device
        on_cpu = torch.device(device).type == "cpu"
        self.weights = weights if on_cpu else [([part.to(device) for part in gu], d.to(device)) for gu, d in weights]

    def gate_up_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        parts = [part.to(self.device, dtype) for part in self.weights[expert][0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def down_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weights[expert][1].to(self.device, dtype)


class LoadedExperts(Experts):
    """The experts of a loaded 16-bit model, whose module keeps the weights."""

    def __init__(self, original):
        super().__init__(original)
        up_EOH, down_EHI = original.gate_up_proj, original.down_proj
        self.weights = (up_EOH.mT, down_EHI.mT) if original.is_transposed else (up_EOH, down_EHI)

    def gate_up_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weights[0][expert].to(dtype)

    def down_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weights[1][expert].to(dtype)


ON_CPU = "moepress"
"""Name, for `set_experts_implementation`, of the same loop over experts: on CPU faster than transformers' grouped products
where experts are small and many, and the experts of all families take "no expert" in it."""
ALL_EXPERTS_FUNCTIONS.register(ON_CPU, lambda experts, *routed: LoadedExperts(experts)(*routed))
