"""How many bytes the packed format takes, as plain arithmetic: imports no torch, so that a budget is planned in a moment."""

from collections.abc import Sequence

from moepress.models.families import Shape, group_of

ZERO_STEPS = 4
"""Zero points are kept in quarters of a quantization step, so they need two bits more than the codes."""


def zero_width(bits: int) -> int:
    return bits + 2


def fields(width: int) -> list[int]:
    """Powers of two that sum to `width`, largest first: 3 -> [2, 1]."""
    assert 1 <= width <= 15, width
    return [1 << power for power in range(3, -1, -1) if width >> power & 1]


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take; each stream of fields is filled to a whole byte."""
    return sum(-(-count * field // 8) for field in fields(width))


def matrix_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of one packed matrix: codes, zero points, float16 scales."""
    groups = rows * columns // group_of(columns, group_size)
    return packed_bytes(rows * columns, bits) + packed_bytes(groups, zero_width(bits)) + 2 * groups


def expert_bytes(shape: Shape, bits: int, group_size: int) -> int:
    """Bytes of one expert: its gate and up projections as one matrix, and its down projection."""
    gate_up = matrix_bytes(2 * shape.intermediate_size, shape.hidden_size, bits, group_size)
    return gate_up + matrix_bytes(shape.hidden_size, shape.intermediate_size, bits, group_size)


def feasible_range(num_experts: int, widths: Sequence[int], sizes: Sequence[float], keep: Sequence[int]) -> tuple[float, float]:
    """Smallest and largest total size that `num_experts` experts can take when each width of `keep` is taken once."""
    size = dict(zip(widths, sizes, strict=True))
    if len(keep) > num_experts:
        raise ValueError(f"allocation.keep={list(keep)} asks for {len(keep)} experts, a layer has {num_experts}")
    kept, rest = sum(size[w] for w in keep), num_experts - len(keep)
    return kept + rest * min(sizes), kept + rest * max(sizes)


def check_measured(widths: list[int], measured: list[int]) -> None:
    """ValueError for widths of an allocation at which no errors are measured."""
    missing = sorted(set(widths) - set(measured))
    if missing:
        raise ValueError(f"allocation.widths={widths}: no errors were measured at {missing}; add them to statistics.widths")


def mixed(sizes: dict[int, int], total: float, num_experts: int, mixes: bool = True) -> list[int]:
    """Widths of experts that fill a total: the widest that fits all and, if it `mixes`, the next for the first of them."""
    narrow = max((width for width in sizes if sizes[width] * num_experts <= total + 1e-9), default=min(sizes))
    wide = min((width for width in sizes if width > narrow), default=narrow)
    wider = 0
    if mixes and wide != narrow:
        wider = int((total - num_experts * sizes[narrow] + 1e-9) / (sizes[wide] - sizes[narrow]))
    return [wide] * wider + [narrow] * (num_experts - wider)
