"""How numbers and tables look in a terminal and in messages."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]], left_last: bool = False) -> list[str]:
    """Columns: the first flush left, the others flush right, perhaps but the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    flush_left = {0, len(widths) - 1} if left_last else {0}
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(f"{c:{w}}" if i in flush_left else f"{c:>{w}}" for i, (c, w) in enumerate(cells)).rstrip())
    return lines


def count(number: float) -> str:
    """`671.0B`, `3.6M`."""
    unit, name = next((unit for unit in ((1e9, "B"), (1e6, "M")) if number >= unit[0]), (1e3, "K"))
    return f"{number / unit:.1f}{name}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def readable(num_bytes: float, rounded=round) -> str:
    """`1.25GiB`, `312.40MiB`, in a form that allocation.budget takes."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{rounded(100 * num_bytes / unit) / 100:.2f}{name}"
