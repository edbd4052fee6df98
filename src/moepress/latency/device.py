"""What a device can do, measured: bytes that it reads in a second, and floating-point operations of a matrix product."""

import platform
import time
from importlib import metadata

import torch

PACKAGES = ("torch", "transformers", "triton", "numba")
"""Whose versions a time depends on."""
LARGEST_MATRIX = 8192
"""Rows of the last square matrix that is tried, at 16 bits 128 MiB."""
LONG_ENOUGH = 0.02
"""Seconds of a matrix product that no start-up cost shows in."""
TRIALS = 5


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device) -> float:
    """Seconds of one call, with all that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def fastest(function, device) -> float:
    """Seconds of the fastest of some calls: what the device can do, whoever else is using it."""
    return min(seconds(function, device) for _ in range(TRIALS))


def bandwidth(device, num_bytes: int) -> float:
    """Bytes per second of the memory: on a CPU of reading a buffer (its sum), on a GPU of copying one (read and written).

    num_bytes: of the buffer, many times the caches.
    """
    buffer = torch.ones(num_bytes // 4, device=device)
    if buffer.is_cuda:
        other = torch.empty_like(buffer)
        return 2 * buffer.nbytes / fastest(lambda: other.copy_(buffer), device)
    return buffer.nbytes / fastest(buffer.sum, device)


def flop_rate(device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of square matrices, doubled in size until it takes a while."""
    size, best = 256, 0.0
    while size < LARGEST_MATRIX:
        size *= 2
        a = torch.full((size, size), 1e-3, device=device, dtype=dtype)
        taken = fastest(lambda a=a: a @ a, device)
        best = max(best, 2 * size**3 / taken)
        if taken > LONG_ENOUGH:
            break
    return best


def versions() -> dict[str, str]:
    """Package -> version, of Python, those of PACKAGES that are installed, and CUDA."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
