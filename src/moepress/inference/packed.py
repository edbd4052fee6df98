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

COMPILED = (1, 2, 3, 4, 8)
"""Widths that the compiled products of a CPU have."""
LANES = 16
"""Columns that they take at a time; a group must be a multiple."""
FEW = 4
"""Slots for each matrix, on average, up to which products from the packed words take less time than unpacking and torch's.

They are even at 4 (512 x 128) to 12 slots (7168 x 1024), on one thread of a Zen 4: benchmarks/cpu_inference.py --slots."""


def _cpu():
    """The compiled products, only where one is due: a first import compiles them."""
    from moepress.inference import cpu

    return cpu


class PackedMatrices(nn.Module):
    """E matrices `[rows, columns]`, matrix e in bits[e] bits; buffers `codes`, `zeros` (uint8) and `scales` (float16)."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def __init__(self, bits: list[int], rows: int, columns: int, group_size: int, device=None):
        super().__init__()
        group_size = group_of(columns, group_size)
        self.bits, self.rows, self.columns, self.group_size = list(bits), rows, columns, group_size
        groups = rows * columns // group_size
        code_sizes = [packed_bytes(rows * columns, b) for b in bits]
        zero_sizes = [packed_bytes(groups, zero_width(b)) for b in bits]
        self.code_starts = [sum(code_sizes[:e]) for e in range(len(bits) + 1)]
        self.zero_starts = [sum(zero_sizes[:e]) for e in range(len(bits) + 1)]
        self.places = torch.tensor([bits, self.code_starts[:-1], self.zero_starts[:-1]], device="cpu")
        self.has_kernel = set(bits) <= set(COMPILED) and group_size % LANES == 0
        scales = torch.empty(len(bits), rows, columns // group_size, dtype=torch.float16, device=device)
        self.register_buffer("codes", torch.empty(self.code_starts[-1], dtype=torch.uint8, device=device))
        self.register_buffer("zeros", torch.empty(self.zero_starts[-1], dtype=torch.uint8, device=device))
        self.register_buffer("scales", scales)

    def matrix(self, e: int, dtype: torch.dtype) -> torch.Tensor:
        """Matrix e, `[rows, columns]`, unpacked."""
        if self.is_compiled:
            return _cpu().matrix(self, e, dtype)
        return self.matrix_by_torch(e, dtype)

    def matrix_by_torch(self, e: int, dtype: torch.dtype) -> torch.Tensor:
        """The same anywhere, differentiable in the scales."""
        bits, groups = self.bits[e], self.columns // self.group_size
        codes = unpack(self.codes[self.code_starts[e] : self.code_starts[e + 1]], self.rows * self.columns, bits)
        zeros = unpack(self.zeros[self.zero_starts[e] : self.zero_starts[e + 1]], self.rows * groups, zero_width(bits))
        shape = (self.rows, groups)
        return dequantize(codes.view(self.rows, self.columns), self.scales[e], zeros.view(shape), dtype)

    @property
    def is_compiled(self) -> bool:
        """Whether there are compiled products: on a CPU, unless widths or groups are odd or the scales are being tuned."""
        return self.has_kernel and self.codes.is_cpu and self.scales.dtype == torch.float16

    def multiplies(self, x: torch.Tensor, num_slots: int) -> bool:
        """Whether `products` from the packed words is the way for so many slots; it has no backward."""
        few = 0 < num_slots <= FEW * len(self.bits)
        return few and x.is_cpu and self.is_compiled and not (x.requires_grad and torch.is_grad_enabled())

    def products(self, x_TI: torch.Tensor, experts_N: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, rows]`: slot n is matrix `experts[n]` times row `n // (N / T)` of x, `[T, columns]`; zeros where there
        is no such matrix."""
        return _cpu().products(self, x_TI, experts_N)

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
        num_slots = x.shape[:-1].numel()
        if kernels.take(self, x):
            return kernels.linear_forward(self, x)
        if self.multiplies(x, num_slots):
            y = self.products(x.reshape(num_slots, -1), torch.zeros(num_slots, dtype=torch.long)).to(x.dtype)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.matrix(0, x.dtype), self.bias)


class PackedExperts(Experts):
    """Routed experts whose weights stay packed, expert e in bits[e] bits; see `Experts` for `original`.

    On a GPU they run through the kernels where they can be used; `model.set_experts_implementation` chooses otherwise.
    """

    def __init__(self, original, bits: list[int], group_size: int, device=None):
        super().__init__(original)
        self.config = getattr(original, "config", None)
        H, I = self.hidden_size, self.intermediate_size
        assert len(bits) == self.num_experts, (len(bits), self.num_experts)
        self.gate_up = PackedMatrices(bits, 2 * I, H, group_size, device)
        self.down = PackedMatrices(bits, H, I, group_size, device)

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK) -> torch.Tensor:
        """As `Experts` has it: on a GPU by the kernels, few tokens on a CPU from the packed words."""
        routed = (hidden_TH, top_k_index_TK, top_k_weights_TK)
        if kernels.take(self, hidden_TH, getattr(self.config, "_experts_implementation", None)):
            return kernels.experts_forward(self, *routed)
        if self.gate_up.multiplies(hidden_TH, top_k_index_TK.numel()) and self.down.is_compiled:
            return self.few_tokens(*routed)
        return super().forward(*routed)

    def few_tokens(self, hidden_TH, top_k_index_TK, top_k_weights_TK) -> torch.Tensor:
        """Weighted sum of the selected experts' outputs `[T, H]`; index E means "no expert". N = T * K slots, O = 2 * I."""
        T, K = top_k_index_TK.shape
        experts_N = top_k_index_TK.reshape(-1)
        up_NO = self.gate_up.products(hidden_TH, experts_N)
        if self.gate_up_proj_bias is not None:
            held_N = experts_N.clamp(max=self.num_experts - 1)
            up_NO = up_NO + self.gate_up_proj_bias[held_N]
        out_NH = self.down.products(self.activate(up_NO), experts_N)
        if self.down_proj_bias is not None:
            out_NH = out_NH + self.down_proj_bias[held_N]
            out_NH = out_NH.masked_fill((experts_N == self.num_experts)[:, None], 0)
        out_T1H = torch.bmm(top_k_weights_TK.float().unsqueeze(1), out_NH.view(T, K, -1))
        return out_T1H.squeeze(1).to(hidden_TH.dtype)

    def gate_up_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.gate_up.matrix(expert, dtype)

    def down_matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.down.matrix(expert, dtype)
