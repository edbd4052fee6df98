"""The grid of every method here: per group a scale and a zero point, the ends of the range searched, then fitted.

For a group with extremes m <= 0 <= M the candidates are `lo = a m`, `hi = b M` with a and b in `clip_steps` even steps of
[clip_min, clip_max]; the pair with the smallest weighted error wins. From there, with the codes fixed, scale and zero
point are the least-squares line from codes to weights; rounding and fitting alternate `fit_rounds` times. The scale is
what float16 holds, the zero point a multiple of `1 / zero_steps` of a step (at most quarters), so that what is searched is
what is stored. With 1 bit this contains sign(w) * mean|w| up to the step of the zero point.

One step of [1, 1], whole zero points and no fit are the min-max grid that most GPTQ codes round on.

Legend: E experts, O output rows, C columns of one group.
"""

from dataclasses import dataclass

import torch

from moepress.quantization.packing import Quantized
from moepress.quantization.size import ZERO_STEPS


def top_code(bits: list[int], device=None) -> torch.Tensor:
    """`2 ** bits - 1` as float `[E, 1]`, to broadcast over rows."""
    return torch.tensor([[2.0**b - 1] for b in bits], device=device)


ELEMENTS_AT_ONCE = 1 << 19
"""Weights that are searched together: few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class Search:
    """How a grid is looked for; the fields are those of conf/quantization/."""

    clip_min: float
    clip_steps: int
    fit_rounds: int
    clip_max: float = 1.0
    clip_ends: str = "apart"
    clip_norm: float = 2.0
    clip_weighted: bool = True
    zero_steps: int = ZERO_STEPS
    one_bit: str = "grid"


def search(
    w_EOC: torch.Tensor, top_E1: torch.Tensor, importance_EC: torch.Tensor | None, how: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32 values that float16 holds) and zero point (in quarter steps), each `[E, O]`, for one group.

    importance: weight of each column's error (the curvature's diagonal), None for equal weights. The ends are searched
    together, then (clip_ends "apart") each alone: 3 x clip_steps trials. No trial is kept that is worse than the one before.
    """
    if not how.clip_weighted:
        importance_EC = None
    if w_EOC.device.type == "cpu" and how.clip_norm == 2 and how.one_bit == "grid":
        from moepress.quantization import grid_cpu

        return grid_cpu.search(w_EOC, top_E1, importance_EC, how)
    return search_by_torch(w_EOC, top_E1, importance_EC, how)


def search_by_torch(w_EOC, top_E1, importance_EC, how: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch: on any device and for every setting of `Search`."""
    step = max(1, ELEMENTS_AT_ONCE // w_EOC.shape[2])  # rows that stay in the cache through all trials
    scales, zeros = [], []
    for e, top in enumerate(top_E1[:, 0].tolist()):
        weight_C = torch.ones_like(w_EOC[e, 0]) if importance_EC is None else importance_EC[e]
        found = [_search(rows.float().contiguous(), top, weight_C.float(), how) for rows in w_EOC[e].split(step)]
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales), torch.stack(zeros)


def _search(w_OC, top: float, weight_C, how: Search):
    if top == 1 and how.one_bit == "sign":
        return sign(w_OC)
    low_O, high_O = w_OC.amin(-1).clamp(max=0), w_OC.amax(-1).clamp(min=0)
    ones = torch.ones_like(low_O)

    def better(trial, found):
        """The trial `(scale, zero, ...)` where its error is smaller: `|scale (round(z) - z)|^norm`, z the weights in codes."""
        scale, zero = trial[:2]
        z = torch.addcmul(zero[:, None] / ZERO_STEPS, w_OC, 1 / scale[:, None])
        error = z.round().clamp_(0, top).sub_(z)
        error = error.square_() if how.clip_norm == 2 else error.abs_().pow_(how.clip_norm)
        error = (error @ weight_C) * scale**how.clip_norm
        wins = error < found[0]
        return tuple(torch.where(wins, new, old) for new, old in zip((error, *trial), found, strict=True))

    found = (ones * torch.inf, ones, 0 * ones, ones, ones)
    for ends in ("both", "low", "high") if how.clip_ends == "apart" else ("both",):
        for ratio in torch.linspace(how.clip_max, how.clip_min, how.clip_steps).tolist():
            a = found[3] if ends == "high" else ratio * ones
            b = found[4] if ends == "low" else ratio * ones
            found = better((*fit(a * low_O, b * high_O, top, how.zero_steps), a, b), found)
    found = found[:3]
    for _ in range(how.fit_rounds):
        found = better(least_squares(w_OC, found[1], found[2], top, weight_C, how.zero_steps), found)
    return found[1:]


def sign(w_OC) -> tuple[torch.Tensor, torch.Tensor]:
    """1 bit as `sign(w) * mean|w|`: a zero point in the middle, the scale from one level to the other. Of a group of zeros the
    scale is 1 and the zero point 0, as `fit` has it."""
    scale = (2 * w_OC.abs().mean(-1)).half().float()
    ones, half = torch.ones_like(scale), torch.full_like(scale, ZERO_STEPS / 2)
    return torch.where(scale > 0, scale, ones), torch.where(scale > 0, half, 0.0)


def least_squares(
    w_OC, scale_O, zero_O, top: float, weight_C, zero_steps: int = ZERO_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point that fit the weights best with the codes of the given ones."""
    codes = torch.addcmul(zero_O[:, None] / ZERO_STEPS, w_OC, 1 / scale_O[:, None]).round_().clamp_(0, top)
    share_C = weight_C / weight_C.sum().clamp(min=1e-30)
    mean_code, mean_w = codes @ share_C, w_OC @ share_C
    spread = codes.sub_(mean_code[:, None])
    slope = ((spread * w_OC) @ share_C) / (spread.square() @ share_C)
    scale = torch.where((slope > 0) & slope.isfinite(), slope, scale_O).half().float()
    scale = torch.where(scale > 0, scale, scale_O)
    return scale, zero_point(mean_code - mean_w / scale, top, zero_steps)


def fit(low: torch.Tensor, high: torch.Tensor, top: float, zero_steps: int = ZERO_STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ranges that contain 0; a constant group of zeros gets scale 1."""
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, zero_point(-low / scale, top, zero_steps)


def zero_point(codes: torch.Tensor, top: float, zero_steps: int) -> torch.Tensor:
    """Zero points, given in codes, as the format counts them: quarters, here in steps of `1 / zero_steps`."""
    return torch.round(codes * zero_steps).clamp(0, zero_steps * top) * (ZERO_STEPS // zero_steps)


def round_to_grid(w_EOC, scale_EO, zero_EO, top_E1) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and the values they stand for, both `[E, O, C]` float32."""
    shift = (zero_EO / ZERO_STEPS).unsqueeze(-1)
    codes = torch.round(w_EOC / scale_EO.unsqueeze(-1) + shift).clamp_(min=0).minimum(top_E1.unsqueeze(-1))
    return codes, (codes - shift) * scale_EO.unsqueeze(-1)


def rtn(w_EOI: torch.Tensor, bits: list[int], group_size: int, how: Search) -> Quantized:
    """Round to nearest: every group on its own best grid, no text read. w: `[E, O, I]`, bits: E widths."""
    E, O, I = w_EOI.shape
    top = top_code(bits, w_EOI.device)
    as_rows = w_EOI.reshape(E, O * (I // group_size), group_size)
    scale, zero = search(as_rows, top, None, how)
    step = max(1, ELEMENTS_AT_ONCE // (E * group_size))
    parts = zip(as_rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True)
    codes = torch.cat([round_to_grid(w.float(), s, z, top)[0].to(torch.uint8) for w, s, z in parts], 1)
    groups = (E, O, I // group_size)
    return Quantized(codes.view(E, O, I), scale.view(groups).half(), zero.view(groups).to(torch.int16), list(bits))


MINMAX = Search(clip_min=1.0, clip_steps=1, fit_rounds=0, clip_ends="together", one_bit="sign")


def minmax(w_EOI: torch.Tensor, bits: list[int], group_size: int) -> Quantized:
    """Round to nearest between each group's extremes, 1 bit as sign(w) * mean|w|: how MC's code (arXiv 2410.06270) measures its
    errors, but for its zero points, which it does not round to quarter steps."""
    return rtn(w_EOI, bits, group_size, MINMAX)
