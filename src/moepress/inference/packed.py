"""Modules whose weights stay packed: experts of mixed widths in one layer, and linears.

Legend: T tokens, H hidden size, I intermediate size, E experts, K selected experts, G groups of a row.
"""

import torch
from torch import nn

from moepress.inference import kernels
from moepress.models.experts import Experts
from moepress.models.families import group_of
from moepress.quantization.packing import dequantize, unpack
from moepress.quantization.size import packed_bytes, zero_width


class PackedMatrices(nn.Module):
    """E matrices `[rows, columns]`, matrix e in bits[e] bits; buffers `codes`, `zeros` (uint8) and `scales` (float16)."""

    def __init__(self, bits: list[int], rows: int, columns: int, group_size: int, device=None):
        super().__init__()
        group_size = group_of(columns, group_size)
        self.bits, self.rows, self.columns, self.group_size = list(bits), rows, columns, group_size
        groups = rows * columns // group_size
        code_sizes = [packed_bytes(rows * columns, b) for b in bits]
        zero_sizes = [packed_bytes(groups, zero_width(b)) for b in bits]
        self.code_starts = [sum(code_sizes[:e]) for e in range(len(bits) + 1)]
        self.zero_starts = [sum(zero_sizes[:e]) for e in range(len(bits) + 1)]
        scales = torch.empty(len(bits), rows, columns // group_size, dtype=torch.float16, device=device)
        self.register_buffer("codes", torch.empty(self.code_starts[-1], dtype=torch.uint8, device=device))
        self.register_buffer("zeros", torch.empty(self.zero_starts[-1], dtype=torch.uint8, device=device))
        self.register_buffer("scales", scales)

    def matrix(self, e: int, dtype: torch.dtype) -> torch.Tensor:
        """Matrix e, `[rows, columns]`, unpacked."""
        bits, groups = self.bits[e], self.columns // self.group_size
        codes = unpack(self.codes[self.code_starts[e] : self.code_starts[e + 1]], self.rows * self.columns, bits)
        zeros = unpack(self.zeros[self.zero_starts[e] : self.zero_starts[e + 1]], self.rows * groups, zero_width(bits))
        shape = (self.rows, groups)
        return dequantize(codes.view(self.rows, self.columns), self.scales[e], zeros.view(shape), dtype)

    def _apply(self, fn, recurse=True):
        """Moves to a device; the scales stay float16 whatever dtype the model is cast to."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{len(self.bits)} x [{self.rows}, {self.columns}], bits={self.bits}, group_size={self.group_size}"


class PackedLinear(PackedMatrices):
    """A linear layer of `bits` bits; on a GPU through the kernels where they can be used."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int):
        super().__init__([bits], linear.out_features, linear.in_features, group_size, linear.weight.device)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if kernels.take(self, x):
            return kernels.linear_forward(self, x)
        return nn.functional.linear(x, self.matrix(0, x.dtype), self.bias)


class PackedExperts(Experts):
    """Routed experts whose weights stay packed, expert e in bits[e] bits; see `Experts` for `original`.

    On a GPU they run through the kernels where they can be used; `model.set_experts_implementation` chooses otherwise.
    """

    def __init__(self, original: nn.Module, bits: list[int], group_size: int, device=None):
        super().__init__(original)
        self.config = getattr(original, "config", None)
        H, I = self.hidden_size, self.intermediate_size
        assert len(bits) == self.num_experts, (len(bits), self.num_experts)
        self.gate_up = PackedMatrices(bits, 2 * I, H, group_size, device)
        self.down = PackedMatrices(bits, H, I, group_size, device)

    def gate_up_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.gate_up.matrix(expert, dtype)

    def down_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.down.matrix(expert, dtype)

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK) -> torch.Tensor:
        if kernels.take(self, hidden_TH, getattr(self.config, "_experts_implementation", None)):
            return kernels.experts_forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK)
        return super().forward(hidden_TH, top_k_index_TK, top_k_weights_TK)
