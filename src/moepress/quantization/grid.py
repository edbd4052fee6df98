"""The grid of every method here: per group a scale and a zero point, both ends of the range searched.

For a group with extremes m <= 0 <= M the candidates are `lo = a m`, `hi = b M` with a and b in `steps` even steps of
[clip_min, 1]; the pair with the smallest weighted squared error wins. The scale is what float16 holds, the zero point a
multiple of a quarter step, so that what is searched is what is stored. With 1 bit this contains sign(w) * mean|w| up to
the quarter step of the zero point.

Legend: E experts, O output rows, C columns of one group.
"""

import torch

from moepress.quantization.packing import ZERO_STEPS, Quantized


def top_code(bits: list[int], device=None) -> torch.Tensor:
    """`2 ** bits - 1` as float `[E, 1]`, to broadcast over rows."""
    return torch.tensor([[2.0**b - 1] for b in bits], device=device)


def search(w_EOC: torch.Tensor, top_E1: torch.Tensor, importance_EC: torch.Tensor | None, clip_min: float, steps: int):
    """Scale (float32 values that float16 holds) and zero point (in quarter steps), each `[E, O]`, for one group of columns.

    importance: weight of each column's squared error (the curvature's diagonal), None for equal weights.
    Both ends together first, then each alone from the best so far: 3 x steps trials instead of steps^2.
    """
    w_EOC = w_EOC.float()
    low_EO, high_EO = w_EOC.amin(-1).clamp(max=0), w_EOC.amax(-1).clamp(min=0)
    ones = torch.ones_like(low_EO)
    error, scale, zero, a, b = ones * torch.inf, ones, ones * 0, ones, ones
    for ends in ("both", "low", "high"):
        for ratio in torch.linspace(1, clip_min, steps).tolist():
            a_try = a if ends == "high" else ratio * ones
            b_try = b if ends == "low" else ratio * ones
            scale_try, zero_try = fit(a_try * low_EO, b_try * high_EO, top_E1)
            _, value = round_to_grid(w_EOC, scale_try, zero_try, top_E1)
            squared = (value - w_EOC).square_()
            error_try = squared.sum(-1) if importance_EC is None else torch.einsum("eoc,ec->eo", squared, importance_EC)
            better = error_try < error
            trial, found = (error_try, scale_try, zero_try, a_try, b_try), (error, scale, zero, a, b)
            error, scale, zero, a, b = (torch.where(better, new, old) for new, old in zip(trial, found, strict=True))
    return scale, zero


def fit(low_EO: torch.Tensor, high_EO: torch.Tensor, top_E1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a range that contains 0; a constant group of zeros gets scale 1."""
    scale = ((high_EO - low_EO) / top_E1).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low_EO / scale * ZERO_STEPS).clamp(min=0).minimum(ZERO_STEPS * top_E1)
    return scale, zero


def round_to_grid(w_EOC, scale_EO, zero_EO, top_E1) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and the values they stand for, both `[E, O, C]` float32."""
    shift = (zero_EO / ZERO_STEPS).unsqueeze(-1)
    codes = torch.round(w_EOC / scale_EO.unsqueeze(-1) + shift).clamp_(min=0).minimum(top_E1.unsqueeze(-1))
    return codes, (codes - shift) * scale_EO.unsqueeze(-1)


def rtn(w_EOI: torch.Tensor, bits: list[int], group_size: int, clip_min: float, steps: int) -> Quantized:
    """Round to nearest: every group on its own best grid, no text read. w: `[E, O, I]`, bits: E widths."""
    E, O, I = w_EOI.shape
    top = top_code(bits, w_EOI.device)
    as_rows = w_EOI.float().reshape(E, O * (I // group_size), group_size)
    scale, zero = search(as_rows, top, None, clip_min, steps)
    codes, _ = round_to_grid(as_rows, scale, zero, top)
    shape = (E, O, I // group_size)
    return Quantized(
        codes.view(E, O, I).to(torch.uint8), scale.view(shape).half(), zero.view(shape).to(torch.int16), list(bits)
    )
