"""Packed experts and linears through the kernels of `device.py`: what is laid out beforehand, and which tile each call takes.

Nothing here waits for the device: shapes of launches follow from the shapes of tensors alone, so a CUDA graph can hold them.

Legend: T tokens, H hidden size, I intermediate size, E experts, K selected experts, S = T * K slots, X blocks of slots.
"""

from dataclasses import dataclass

import torch
import triton

from moepress.inference.kernels import device, is_interpreted, layout, plan

DECODE_TOKENS = 16
"""Up to so many tokens, an expert's tokens are found by looking at all of them, without a sort."""


@dataclass(frozen=True)
class Tile:
    """Of a program: rows of the matrix, slots, groups of columns at a time (one slot only), warps, and stages of its loop."""

    rows: int
    slots: int
    groups: int
    warps: int
    stages: int


ONE = Tile(rows=16, slots=1, groups=4, warps=4, stages=3)
FEW = Tile(rows=64, slots=DECODE_TOKENS, groups=1, warps=4, stages=4)
MANY = {16: FEW} | {n: Tile(rows=128, slots=n, groups=1, warps=8 if n == 128 else 4, stages=3) for n in (32, 64, 128)}
PROGRAMS = 1056
"""Below so many programs (eight for each of an H100's 132 multiprocessors) columns are split between several."""


def tile_for(num_tokens: int, slots_per_matrix: float) -> Tile:
    """The smallest tile that takes a matrix's slots in one block, were they spread evenly; for few tokens by their number."""
    if num_tokens == 1:
        return ONE
    if num_tokens <= DECODE_TOKENS:
        return FEW
    return MANY[min(128, max(16, triton.next_power_of_2(int(slots_per_matrix))))]


class Matrices:
    """Where the kernels find each matrix of a `PackedMatrices`; the weights stay where they are."""

    def __init__(self, packed):
        self.packed = packed
        starts = [start // layout.ALIGN for start in packed.code_starts[:-1]]
        self.table = torch.tensor([starts, packed.zero_starts[:-1], packed.bits], device=packed.codes.device)
        group = packed.group_size
        self.shape = {
            "WIDTHS": sum(1 << width for width in set(packed.bits)),
            "E": len(packed.bits),
            "ROWS": packed.rows,
            "COLUMNS": packed.columns,
            "GROUP": group,
            "TILE_CHUNKS": triton.next_power_of_2(group // layout.CHUNK),
        }

    def splits(self, tile: Tile, blocks: int) -> int:
        """Into how many parts the columns go, so that the device has work for all its multiprocessors; a power of two."""
        programs = blocks * triton.cdiv(self.packed.rows, tile.rows)
        span = tile.groups * self.packed.group_size if tile.slots == 1 else layout.TILE
        most = max(1, triton.cdiv(self.packed.columns, span) // 2)
        splits = 1
        while splits * programs < PROGRAMS and 2 * splits <= min(most, 16):
            splits *= 2
        return splits

    def multiply(self, x, y, tile: Tile, find: int, programs: int, num_slots: int, join=None, bias=None, slots=None, blocks=None,
                 choices: int = 1, x_per_slot: bool = True) -> None:  # fmt: skip
        """See `device.multiply`. x: planes. y: `[splits, S, rows]`, or with `join` the planes `[S, ...]` of the next input."""
        packed, y = self.packed, y if y.dim() == 3 else y[None]
        per_program = tile.rows // 2 if join else tile.rows
        outputs = packed.rows // 2 if join else packed.rows
        device.multiply[(programs, triton.cdiv(outputs, per_program), len(y))](
            x, x.stride(0), y, y.stride(1), y.stride(0), packed.codes, packed.zeros, packed.scales, self.table,
            bias if bias is not None else self.table, slots if slots is not None else self.table,
            blocks if blocks is not None else self.table, num_slots, join.alpha if join else 0.0, join.limit if join else 0.0,
            FIND=find, JOIN=join.code if join else 0, HAS_BIAS=bias is not None,
            INTERLEAVED=bool(join and join.interleaved), K=choices, X_PER_SLOT=x_per_slot, R=tile.rows, B=tile.slots,
            SLOTS=triton.next_power_of_2(num_slots) if find == layout.LEADER else 1, CHOICES=triton.next_power_of_2(choices),
            SPLITS=len(y), TILE_GROUPS=tile.groups, WIDEN=is_interpreted() and x.dtype == torch.bfloat16, num_warps=tile.warps, num_stages=tile.stages, **self.shape,
        )  # fmt: skip


def combine(parts: torch.Tensor, out: torch.Tensor, num_experts: int = 1, experts=None, weights=None) -> torch.Tensor:
    """Sum of the parts `[splits, S, columns]`, and of a token's slots by their weights, into out `[T, columns]`."""
    splits, num_slots, columns = parts.shape
    block = min(1024, triton.next_power_of_2(columns))
    device.combine[(len(out), triton.cdiv(columns, block))](
        parts, out, experts if experts is not None else parts, weights if weights is not None else parts, num_slots, columns,
        E=num_experts, K=num_slots // max(1, len(out)), SPLITS=splits, WEIGHTED=experts is not None, BLOCK=block,
    )  # fmt: skip
    return out


def experts_forward(experts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """What `PackedExperts` computes, `[T, H]`; index E means "no expert" and costs nothing. No token takes an expert twice."""
    T, K = index_TK.shape
    if T * K == 0:
        return torch.zeros_like(hidden_TH)
    gate_up, down, join = plan(experts)
    index_TK, weights_TK, E = index_TK.contiguous(), weights_TK.contiguous(), experts.num_experts
    tile = tile_for(T, T * K / E)
    if T <= DECODE_TOKENS:
        found = {"find": layout.LEADER, "programs": T * K, "slots": index_TK}
    else:
        order, blocks = layout.sorted_blocks(index_TK, E, tile.slots)
        found = {"find": layout.SORTED, "programs": blocks.shape[1], "slots": order, "blocks": blocks}
    found |= {"tile": tile, "num_slots": T * K, "choices": K}

    x = layout.planes(hidden_TH)
    span = layout.TILE
    inner = x.new_empty(T * K, triton.cdiv(experts.intermediate_size, span) * span)
    gate_up.multiply(x, inner, join=join, bias=experts.gate_up_proj_bias, x_per_slot=False, **found)
    splits = down.splits(tile, found["programs"])
    parts = x.new_empty(splits, T * K, experts.hidden_size, dtype=torch.float32)
    down.multiply(inner, parts, bias=experts.down_proj_bias, **found)
    return combine(parts, torch.empty_like(hidden_TH), E, index_TK, weights_TK)


def linear_forward(linear, x: torch.Tensor) -> torch.Tensor:
    """What `PackedLinear` computes, `[..., rows]`."""
    x_TC = x.reshape(-1, x.shape[-1])
    T = len(x_TC)
    out = x_TC.new_empty(T, linear.rows)
    if T == 0:
        return out.view(*x.shape[:-1], linear.rows)
    (matrix,) = plan(linear)
    tile = tile_for(T, T)
    programs = triton.cdiv(T, tile.slots)
    splits = matrix.splits(tile, programs)
    parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    matrix.multiply(layout.planes(x_TC), parts, tile, layout.DENSE, programs, T, bias=linear.bias)
    if splits > 1:
        combine(parts, out)
    return out.view(*x.shape[:-1], linear.rows)
