"""Modules whose weights stay packed: experts of mixed widths in one layer, and linears.

Legend: T tokens, H hidden size, I intermediate size, E experts, K selected experts, G groups of a row.
"""

import torch
from torch import nn

from moepress.quantization.packing import dequantize, unpack
from moepress.quantization.size import packed_bytes, zero_width


class PackedMatrices(nn.Module):
    """E matrices `[rows, columns]`, matrix e in bits[e] bits; buffers `codes`, `zeros` (uint8) and `scales` (float16)."""

    def __init__(self, bits: list[int], rows: int, columns: int, group_size: int, device=None):
        super().__init__()
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

    def extra_repr(self) -> str:
        return f"{len(self.bits)} x [{self.rows}, {self.columns}], bits={self.bits}, group_size={self.group_size}"


class PackedLinear(PackedMatrices):
    """A linear layer of `bits` bits."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int):
        super().__init__([bits], linear.out_features, linear.in_features, group_size, linear.weight.device)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix(0, x.dtype), self.bias)


class PackedExperts(nn.Module):
    """Drop-in for a transformers experts module (3-D gate_up_proj and down_proj, gated activation)."""

    def __init__(self, experts: nn.Module, bits: list[int], group_size: int):
        super().__init__()
        E, double, H = experts.gate_up_proj.shape
        assert len(bits) == E, (len(bits), E)
        device = experts.gate_up_proj.device
        self.num_experts = E
        self.act_fn = experts.act_fn
        self.gate_up = PackedMatrices(bits, double, H, group_size, device)
        self.down = PackedMatrices(bits, H, double // 2, group_size, device)

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK) -> torch.Tensor:
        """Weighted sum of the selected experts' outputs `[T, H]`; index E means "no expert" and costs nothing."""
        out_TH = torch.zeros_like(hidden_TH)
        order = top_k_index_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index_TK.reshape(-1), minlength=self.num_experts + 1).tolist()
        tokens = order // top_k_index_TK.shape[1]
        weights = top_k_weights_TK.reshape(-1)[order].to(hidden_TH.dtype)
        start = 0
        for e, count in enumerate(counts[: self.num_experts]):
            if count:
                rows = tokens[start : start + count]
                gate, up = nn.functional.linear(hidden_TH[rows], self.gate_up.matrix(e, hidden_TH.dtype)).chunk(2, dim=-1)
                y = nn.functional.linear(self.act_fn(gate) * up, self.down.matrix(e, hidden_TH.dtype))
                out_TH.index_add_(0, rows, y * weights[start : start + count, None])
            start += count
        return out_TH
