"""How much is computed and how much at once: for the code that computes, and for the plan that predicts it. Imports no torch.

Legend: H hidden size, I intermediate size, E experts.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

TOKENS_AT_ONCE = 4096
"""Tokens in one forward of a layer: bounds the activations beside the stored streams."""

WORKSPACE = 2 << 30
"""Bytes that the curvatures of one batch of experts may take; a single expert may need more."""

KEPT = 1 << 29
"""Bytes that quantized experts' activations may take that are kept for a second use; beyond, they are computed twice."""

DIAGNOSED = 4
"""Every so many-th calibration sequence runs through the 16-bit model where its hidden states serve the diagnostics alone."""

TRIED = 4
"""Steps of the last tuning that tell whether a rate is far too high; after so few, a good one may stand four fifths above the
start."""

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and which ones this process is in."""


def curvature_bytes(width: int) -> int:
    """Bytes of a float32 curvature `[width, width]`, its factor, and what computing that takes."""
    return 6 * 4 * width**2


def experts_at_once(H: int, I: int, E: int) -> int:
    """How many of a layer's E experts go together: as many as the workspace holds."""
    return max(1, min(E, WORKSPACE // curvature_bytes(max(H, I))))


def kept_bytes(tokens: int, I: int, widths: int) -> int:
    """Bytes of the down projections' inputs (float32) of so many routed tokens at so many widths; 0: they are not kept."""
    needed = 4 * widths * tokens * I
    return needed if needed <= KEPT else 0


def fits_router(settings: dict) -> bool:
    """Whether quantization re-fits the routers. settings: of conf/quantization/."""
    return settings["method"] == "qesc" and settings.get("router_loss") != "none"


def followed(settings: dict) -> int:
    """n where every n-th calibration sequence is run through the 16-bit model, too: 1 where its hidden states decide anything,
    DIAGNOSED where they serve the diagnostics alone. settings: of conf/quantization/."""
    tunes_towards_it = settings["tune_steps"] > 0 and settings["tune_asymmetry"] > 0
    reads = fits_router(settings) or settings["asymmetry"] > 0 or tunes_towards_it or settings["distill_steps"] > 0
    return 1 if reads else DIAGNOSED


def num_candidates(num_experts: int, configured: int | None) -> int:
    """K': the configured number, else all of up to 8 experts and a third (at least 8) of more, which is near the paper's
    8 of 16, 20 of 64 and 20 of 60."""
    if configured is not None:
        return min(configured, num_experts)
    return num_experts if num_experts <= 8 else max(8, num_experts // 3)


def free_memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Bytes of RAM that can be taken now: what the machine has free, and no more than any control group has left."""
    left = [limit - used for limit, used in _group_limits(groups, own)]
    return max(0, min([psutil.virtual_memory().available, *left]))


def memory_limit(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Bytes of RAM that this process may take: the machine's, or what a control group above it (a container's, a Slurm job's)
    allows."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _group_limits(groups, own))])


def _group_limits(groups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """`(limit, used)` in bytes of every control group above this process that has a limit. Cached files, which can be dropped
    at once, do not count as used."""
    lines = own.read_text().split() if own.is_file() else []
    for _, controllers, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            top, limit, used, idle = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # the older kind
            top, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        place = top / group.lstrip("/")
        for where in [place, *place.parents]:
            if (most := _number(where / limit)) is not None:
                yield most, (_number(where / used) or 0) - (_number(where / "memory.stat", f"{idle} ") or 0)
            if where == top:
                break


def _number(path: Path, before: str = "") -> int | None:
    """What a group's file says, on the line that begins with `before`; None where it says none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = next((line.removeprefix(before) for line in lines if line.startswith(before)), "")
    return int(found) if found.isdigit() else None
