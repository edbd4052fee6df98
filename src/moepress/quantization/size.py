"""How many bytes the packed format takes, as plain arithmetic: imports no torch, so that a budget is planned in a moment."""

import json
from pathlib import Path

from moepress.models.families import FAMILIES, Shape, is_attention_linear, is_expert_matrix
from moepress.schema import WIDTHS, parse_bytes

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
    groups = rows * columns // group_size
    return packed_bytes(rows * columns, bits) + packed_bytes(groups, zero_width(bits)) + 2 * groups


def expert_bytes(shape: Shape, bits: int, group_size: int) -> int:
    """Bytes of one expert: its gate and up projections as one matrix, and its down projection."""
    gate_up = matrix_bytes(2 * shape.intermediate_size, shape.hidden_size, bits, group_size)
    return gate_up + matrix_bytes(shape.hidden_size, shape.intermediate_size, bits, group_size)


def bytes_outside_experts(shape: Shape, tensors: dict[str, list[int]], attention_bits: int | None, group_size: int) -> int:
    """Bytes of everything that is no expert: attention packed, the rest at 16 bits. tensors: on-disk name -> its shape."""
    total = 0
    family = FAMILIES[shape.family]
    for name, size in tensors.items():
        if is_expert_matrix(family, name):
            continue
        if attention_bits and is_attention_linear(family, name, size):
            total += matrix_bytes(*size, attention_bits, group_size)
        else:
            total += 2 * _product(size)
    return total


def num_weights(tensors: dict[str, list[int]]) -> int:
    return sum(_product(size) for size in tensors.values())


def _product(size: list[int]) -> int:
    total = 1
    for side in size:
        total *= side
    return total


def read_header(path: Path) -> dict[str, dict]:
    """A safetensors file's tensors, name -> `{dtype, shape, data_offsets}`, without reading them.

    Raises ValueError naming a file whose size is not what its header says.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= path.stat().st_size else None
        except ValueError:
            header = None
    if header is None:
        raise ValueError(f"{path}: not a whole safetensors file (its header cannot be read); fetch it again")
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != path.stat().st_size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, its header says {8 + length + end}; fetch it again")
    return header


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: entry["shape"] for path in files for name, entry in read_header(path).items()}


def feasible_range(num_experts: int, widths: list[int], sizes: list[float], keep: list[int]) -> tuple[float, float]:
    """Smallest and largest total size that `num_experts` experts can take when each width of `keep` is taken once."""
    size = dict(zip(widths, sizes, strict=True))
    if len(keep) > num_experts:
        raise ValueError(f"allocation.keep={list(keep)} asks for {len(keep)} experts, a layer has {num_experts}")
    kept, rest = sum(size[w] for w in keep), num_experts - len(keep)
    return kept + rest * min(sizes), kept + rest * max(sizes)


def plan_budget(
    config: dict, shape: Shape, tensors: dict[str, list[int]], attention_bits: int | None, group_size: int
) -> tuple[dict[int, int], float]:
    """`({width: size of one expert}, total for all experts)`, in bytes where config["budget"] is set, else in bits.

    config: as in conf/allocation/. tensors: as in `bytes_outside_experts`; read only for a budget in bytes.
    Raises ValueError, naming the budgets that can be met, where no allocation meets this one.
    """
    num_experts = shape.num_layers * shape.num_experts
    widths, keep, budget = config.get("widths", WIDTHS), config.get("keep", []), config["budget"]
    if budget is None:
        sizes, total = {width: width for width in widths}, config["bits"] * num_experts
    else:
        outside = bytes_outside_experts(shape, tensors, attention_bits, group_size)
        sizes = {width: expert_bytes(shape, width, group_size) for width in widths}
        total = parse_bytes(budget) - outside
    low, high = (bound * shape.num_layers for bound in feasible_range(shape.num_experts, widths, list(sizes.values()), keep))
    if budget is not None and total < low:
        raise ValueError(
            f"allocation.budget={budget}: no allocation fits; this model takes from {(low + outside) / 2**20:.2f}MiB "
            f"(every expert as narrow as allowed) to {(high + outside) / 2**20:.2f}MiB"
        )
    if budget is None and not low - 1e-9 <= total <= high + 1e-9:
        kept = f" with allocation.keep={keep}" if keep else ""
        raise ValueError(
            f"allocation.bits={config['bits']:g}: no allocation meets it{kept}; averages from {low / num_experts:g} to "
            f"{high / num_experts:g} can be met"
        )
    return sizes, total
