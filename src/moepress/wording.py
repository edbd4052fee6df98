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
    """`12 min`, in the largest unit that leaves two digits."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def readable(num_bytes: float, rounded=round) -> str:
    """`1.25GiB`, `312.40MiB`: as allocation.budget takes it, for the command. Reports have `rounded_bytes`."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{rounded(100 * num_bytes / unit) / 100:.2f}{name}"


def rounded_bytes(count: float) -> str:
    """`1.25 GiB`, `312 MiB`: three digits with the largest binary unit, for reports and cards."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            value = count / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"


def decimal(value: float, places: int, sign: bool = True) -> str:
    """A number with so many digits behind the point; without a sign where it rounds to zero."""
    text = f"{value:{'+' if sign else ''}.{places}f}"
    return text.lstrip("+-") if float(text) == 0 else text
