"""Packed experts and linears through the kernels of `device.py`: what is laid out beforehand, and which tile each call takes.

Nothing here waits for the device: shapes of launches follow from the shapes of tensors alone, so a CUDA graph can hold them.

Legend: T tokens, H hidden size, I intermediate size, E experts, K selected experts, S = T * K slots, X blocks of slots.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from moepress.inference.kernels import device, is_interpreted, layout, plan

DECODE_TOKENS = 16
"""Up to so many tokens, an expert's tokens are found by looking at all of them, without a sort."""


@dataclass(frozen=True)
class Tile:
    """What one program takes: rows of the matrix, slots, tiles of columns at a time (more than one only for one slot), warps,
    and stages of its loop. These were chosen by the compiled code (registers, instructions a weight), not yet by the clock."""

    rows: int
    slots: int
    at_once: int
    warps: int
    stages: int


ONE = Tile(rows=32, slots=1, at_once=4, warps=4, stages=1)
FEW = Tile(rows=128, slots=DECODE_TOKENS, at_once=1, warps=4, stages=3)
MANY = [FEW, *(Tile(rows=128, slots=slots, at_once=1, warps=4, stages=3) for slots in (32, 64))]
MANY += [Tile(rows=128, slots=128, at_once=1, warps=8, stages=3), Tile(rows=128, slots=256, at_once=1, warps=8, stages=2)]
PROGRAMS = 1056
"""Below so many programs (eight for each of an H100's 132 multiprocessors) columns are split between several."""


def tile_for(x_TC: torch.Tensor, slots_per_matrix: float) -> Tile:
    """By the number of tokens where they are few; else the smallest that takes a matrix's slots in one block, were they spread
    evenly, as far as the device's shared memory goes."""
    if len(x_TC) == 1:
        return ONE
    if len(x_TC) <= DECODE_TOKENS:
        return FEW
    fitting = [tile for tile in MANY if _shared_bytes(tile, x_TC.element_size()) <= _shared_limit(x_TC.device)] or [FEW]
    return next((tile for tile in fitting if tile.slots >= slots_per_matrix), fitting[-1])


def _shared_bytes(tile: Tile, itemsize: int) -> int:
    """Bytes of shared memory for the inputs and the codes (at 8 bits) in all stages of the loop."""
    return tile.stages * layout.CHUNK * layout.PLANE * (tile.slots * itemsize + tile.rows)


@cache
def _shared_limit(device: torch.device) -> int:
    if device.type == "cpu":
        return 2**31
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


class Matrices:
    """Where the kernels find each matrix of a `PackedMatrices`; the weights stay where they are."""

    def __init__(self, packed):
        self.packed = packed
        starts = [start // layout.ALIGN for start in packed.code_starts[:-1]]
        self.table = torch.tensor([starts, packed.zero_starts[:-1], packed.bits], device=packed.codes.device)
        self.plane = layout.plane_of(packed.group_size)
        self.shape = {
            "WIDTHS": sum(1 << width for width in set(packed.bits)),
            "E": len(packed.bits),
            "ROWS": packed.rows,
            "COLUMNS": packed.columns,
            "GROUP": packed.group_size,
            "PLANE": self.plane,
        }

    def splits(self, tile: Tile, blocks: int) -> int:
        """Into how many parts the columns go, so that the device has work for all its multiprocessors; a power of two."""
        programs = blocks * triton.cdiv(self.packed.rows, tile.rows)
        most = min(16, self.packed.columns // (layout.CHUNK * self.plane * tile.at_once) // 4)
        splits = 1
        while splits * programs < PROGRAMS and 2 * splits <= most:
            splits *= 2
        return splits

    def multiply(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        tile: Tile,
        find: int,
        programs: int,
        num_slots: int,
        choices: int = 1,
        slots: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        join: layout.Join | None = None,
        out_plane: int = 1,
        x_per_slot: bool = True,
    ) -> None:
        """See `device.multiply`. x: planes, of every slot or every token. y: `[splits, S, rows]`; with `join` the planes
        `[1, S, rows / 2]` that the next matrix takes, of `out_plane` chunks."""
        packed, absent = self.packed, self.table
        rows, step = (packed.rows // 2, tile.rows // 2) if join else (packed.rows, tile.rows)
        device.multiply[(programs, triton.cdiv(rows, step), len(y))](
            x, x.stride(0), y, y.stride(1), y.stride(0), packed.codes, packed.zeros, packed.scales, self.table,
            absent if bias is None else bias, absent if slots is None else slots, absent if blocks is None else blocks,
            num_slots, join.alpha if join else 0.0, join.limit if join else 0.0,
            **self.shape, FIND=find, JOIN=join.code if join else 0, INTERLEAVED=bool(join and join.interleaved),
            HAS_BIAS=bias is not None, K=choices, X_PER_SLOT=x_per_slot, OUT_PLANE=out_plane, R=tile.rows, B=tile.slots,
            SLOTS=triton.next_power_of_2(num_slots) if find == layout.LEADER else 1,
            CHOICES=triton.next_power_of_2(choices), SPLITS=len(y), AT_ONCE=tile.at_once,
            WIDEN=is_interpreted() and x.dtype == torch.bfloat16, num_warps=tile.warps, num_stages=tile.stages,
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


def _input(x_TC: torch.Tensor, matrices: Matrices) -> torch.Tensor:
    """Planes of the inputs; of a single one as float32, which its kernel would otherwise convert for every row."""
    return layout.planes(x_TC.float() if len(x_TC) == 1 else x_TC, matrices.plane)


def experts_forward(experts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """What `PackedExperts` computes, `[T, H]`; index E means "no expert" and costs nothing. No token takes an expert twice."""
    T, K = index_TK.shape
    if T * K == 0:
        return torch.zeros_like(hidden_TH)
    gate_up, down, join = plan(experts)
    index_TK, weights_TK, E = index_TK.contiguous(), weights_TK.contiguous(), experts.num_experts
    tile = tile_for(hidden_TH, T * K / E)
    if T <= DECODE_TOKENS:
        found = {"find": layout.LEADER, "programs": T * K, "slots": index_TK}
    else:
        order, blocks = layout.sorted_blocks(index_TK, E, tile.slots)
        found = {"find": layout.SORTED, "programs": blocks.shape[1], "slots": order, "blocks": blocks}
    found |= {"tile": tile, "num_slots": T * K, "choices": K}

    x = _input(hidden_TH, gate_up)
    inner = x.new_empty(1, T * K, experts.intermediate_size)
    bias = experts.gate_up_proj_bias
    gate_up.multiply(x, inner, join=join, out_plane=down.plane, bias=bias, x_per_slot=False, **found)
    splits = down.splits(tile, found["programs"])
    parts = x.new_empty(splits, T * K, experts.hidden_size, dtype=torch.float32)
    down.multiply(inner[0], parts, bias=experts.down_proj_bias, **found)
    return combine(parts, torch.empty_like(hidden_TH), E, index_TK, weights_TK)


def linear_forward(linear, x: torch.Tensor) -> torch.Tensor:
    """What `PackedLinear` computes, `[..., rows]`."""
    x_TC = x.reshape(-1, x.shape[-1])
    T = len(x_TC)
    out = x_TC.new_empty(T, linear.rows)
    if T == 0:
        return out.view(*x.shape[:-1], linear.rows)
    (matrix,) = plan(linear)
    tile = tile_for(x_TC, T)
    programs = triton.cdiv(T, tile.slots)
    splits = matrix.splits(tile, programs)
    parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    matrix.multiply(_input(x_TC, matrix), parts, tile, layout.DENSE, programs, T, bias=linear.bias)
    if splits > 1:
        combine(parts, out)
    return out.view(*x.shape[:-1], linear.rows)
