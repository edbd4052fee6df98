"""`grid.search` on a CPU, compiled by numba: a row of a group stays in the first cache through all of its trials.

`grid.search_by_torch` is the plain twin: the same trials in the same order. Sums run in another order here, so of two
trials whose errors agree to rounding either may win.

Legend: E experts, O output rows, C columns of one group.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

from moepress.quantization.size import ZERO_STEPS

ROWS = 64
"""That a thread takes at a time: about a tenth of a millisecond."""
SUMS = {"reassoc", "contract", "nsz"}
"""What a sum over columns may do for the sake of vector registers; NaN and infinity keep their meaning."""

zero, one = np.float32(0), np.float32(1)


@njit
def half(x):
    """x rounded to what float16 holds, of x >= 0."""
    if x < np.float32(2**-14):
        return np.rint(x * np.float32(2**24)) * np.float32(2**-24)
    bits = np.float32(x).view(np.uint32)
    bits = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    found = np.uint32(bits).view(np.float32)
    return np.float32(np.inf) if found > np.float32(65504) else found


@njit
def zero_point(codes, top, zero_steps):
    """As `grid.zero_point`."""
    steps = np.float32(zero_steps)
    return min(max(np.rint(codes * steps), zero), steps * top) * np.float32(ZERO_STEPS // zero_steps)


@njit
def fit(low, high, top, zero_steps):
    """As `grid.fit`."""
    scale = half((high - low) / top)
    if not scale > 0:
        scale = one
    return scale, zero_point(-low / scale, top, zero_steps)


@njit(fastmath=SUMS)
def squared_error(w_C, weight_C, scale, zero_quarters, top):
    """`sum weight (scale (round(z) - z))^2`, z the weights in codes."""
    inverse, shift, total = one / scale, zero_quarters / np.float32(ZERO_STEPS), zero
    for c in range(len(w_C)):
        z = w_C[c] * inverse + shift
        off = min(max(np.rint(z), zero), top) - z
        total += weight_C[c] * off * off
    return total * scale * scale


@njit(fastmath=SUMS)
def least_squares(w_C, share_C, scale, zero_quarters, top, zero_steps):
    """As `grid.least_squares`; share: the weights of the columns, 1 in all."""
    inverse, shift = one / scale, zero_quarters / np.float32(ZERO_STEPS)
    mean_code, mean_w = zero, zero
    for c in range(len(w_C)):
        mean_code += share_C[c] * min(max(np.rint(w_C[c] * inverse + shift), zero), top)
        mean_w += share_C[c] * w_C[c]
    both, square = zero, zero
    for c in range(len(w_C)):
        spread = min(max(np.rint(w_C[c] * inverse + shift), zero), top) - mean_code
        both += share_C[c] * spread * w_C[c]
        square += share_C[c] * spread * spread
    slope = both / square if square > 0 else zero
    found = half(slope) if slope > 0 and np.isfinite(slope) else scale
    if not found > 0:
        found = scale
    return found, zero_point(mean_code - mean_w / found, top, zero_steps)


@njit(nogil=True, cache=True)
def search_rows(w_OC, weight_C, share_C, top, ratios, is_apart, fit_rounds, zero_steps, scales_O, zeros_O):
    """The best scale and zero point of each row, into `scales` and `zeros`."""
    for o in range(len(w_OC)):
        w_C = w_OC[o]
        low, high = min(zero, w_C.min()), max(zero, w_C.max())
        best, scale, quarters, a, b = np.float32(np.inf), one, zero, one, one
        for ends in range(3 if is_apart else 1):  # both, low, high
            for ratio in ratios:
                trial_a, trial_b = a if ends == 2 else ratio, b if ends == 1 else ratio
                trial = fit(trial_a * low, trial_b * high, top, zero_steps)
                error = squared_error(w_C, weight_C, trial[0], trial[1], top)
                if error < best:
                    best, scale, quarters, a, b = error, trial[0], trial[1], trial_a, trial_b
        for _ in range(fit_rounds):
            trial = least_squares(w_C, share_C, scale, quarters, top, zero_steps)
            error = squared_error(w_C, weight_C, trial[0], trial[1], top)
            if error < best:
                best, scale, quarters = error, trial[0], trial[1]
        scales_O[o], zeros_O[o] = scale, quarters


def search(w_EOC: torch.Tensor, top_E1: torch.Tensor, importance_EC: torch.Tensor | None, how) -> tuple:
    """`grid.search` for `how.clip_norm` 2; `w` and the result on the CPU."""
    E, O, C = w_EOC.shape
    w = w_EOC.float().contiguous().numpy()
    weight = np.ones((E, C), np.float32) if importance_EC is None else importance_EC.float().contiguous().numpy()
    share = weight / np.maximum(weight.sum(1, keepdims=True), np.float32(1e-30))
    ratios = torch.linspace(how.clip_max, how.clip_min, how.clip_steps).numpy()
    told = (ratios, how.clip_ends == "apart", how.fit_rounds, how.zero_steps)
    scales, zeros = np.empty((2, E, O), np.float32)

    def part(place: tuple[int, slice]) -> None:
        e, rows = place
        top = np.float32(top_E1[e, 0].item())
        search_rows(w[e, rows], weight[e], share[e], top, *told, scales[e, rows], zeros[e, rows])

    places = [(e, slice(start, start + ROWS)) for e in range(E) for start in range(0, O, ROWS)]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(part, places))
    return torch.from_numpy(scales), torch.from_numpy(zeros)
