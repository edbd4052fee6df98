"""Scales, zero points and codes once more after GPTQ, each at the best value that the others leave it.

All three steps lower the same objective as GPTQ's, `tr((W - Q) H (W - Q)^T)`, each row of W by itself, and none raises it:

- scales: least squares with the codes fixed, `min_s (w - B s)^T H (w - B s)`, B the codes less their zero point, a column a
  group; rounded to float16, and a row that rounding would make worse keeps its own;
- zero points: one group after the other, the shift that the gradient asks for, in the grid's steps;
- codes: coordinate descent, one sweep over the columns: the code nearest to the minimum along its column.

Legend: O output rows, I input columns, G groups of a row, B columns of one block.
"""

import torch

from moepress.quantization import grid
from moepress.quantization.gptq import damped
from moepress.quantization.packing import Quantized

BLOCK = 128
"""Columns between two updates of the whole gradient."""


def refine(
    w_EOI: torch.Tensor, h_EII: torch.Tensor, start: Quantized, damping: float, rounds: int, zero_steps: int
) -> Quantized:
    """`start` improved in `rounds` rounds. w: what is approximated, `[E, O, I]`; h: the curvature that `start` was found with,
    damped as there; zero_steps: of a code's step, as `grid.Search` has it."""
    if not rounds:
        return start
    parts = []
    for e, bits in enumerate(start.bits):
        h_II = damped(h_EII[e].float().clone(), damping)
        rows = Rows(w_EOI[e].float(), h_II, start.codes[e], start.scales[e], start.zeros[e], 2**bits - 1)
        for _ in range(rounds):
            rows.fit_scales()
            rows.shift_zeros(zero_steps)
            rows.sweep_codes()
        parts.append((rows.codes_OI.to(torch.uint8), rows.scales_OG.half(), rows.zeros_OG.to(torch.int16)))
    codes, scales, zeros = (torch.stack(part) for part in zip(*parts, strict=True))
    return Quantized(codes, scales, zeros, list(start.bits))


class Rows:
    """The rows of one matrix on their grids, all float32: codes `[O, I]`, scales and zero points `[O, G]` (in quarters), the
    damped curvature `[I, I]`, its diagonal above 0."""

    def __init__(self, w_OI, h_II, codes_OI, scales_OG, zeros_OG, top: int):
        self.w_OI, self.h_II, self.top = w_OI, h_II, top
        self.codes_OI, self.scales_OG, self.zeros_OG = codes_OI.float(), scales_OG.float(), zeros_OG.float()
        self.group_size = w_OI.shape[1] // scales_OG.shape[1]

    def levels(self) -> torch.Tensor:
        """`codes - zero points`, `[O, I]`: what the scales multiply."""
        return self.codes_OI - (self.zeros_OG / grid.ZERO_STEPS).repeat_interleave(self.group_size, 1)

    def error(self) -> torch.Tensor:
        """`W - Q`, `[O, I]`."""
        return self.w_OI - self.levels() * self.scales_OG.repeat_interleave(self.group_size, 1)

    def objective(self) -> torch.Tensor:
        """`(w - q)^T H (w - q)` of each row, `[O]`."""
        error = self.error()
        return ((error @ self.h_II) * error).sum(1)

    def fit_scales(self) -> None:
        """Every row's scales at once: `(B^T H B) step = B^T H (w - B s)`."""
        (O, G), levels = self.scales_OG.shape, self.levels()
        in_groups = levels.unflatten(1, (G, self.group_size))
        normal_OGG = torch.empty(O, G, G, device=levels.device)
        for g in range(G):
            columns = slice(g * self.group_size, (g + 1) * self.group_size)
            normal_OGG[:, g] = ((levels[:, columns] @ self.h_II[columns]) * levels).unflatten(1, (G, -1)).sum(-1)
        gradient_OG = ((self.error() @ self.h_II).unflatten(1, (G, -1)) * in_groups).sum(-1)
        diagonal = normal_OGG.diagonal(dim1=-2, dim2=-1)
        diagonal += 1e-6 * diagonal.mean(-1, keepdim=True).clamp(min=1e-20)  # a group all of whose codes are its zero point
        fitted = self.scales_OG + torch.linalg.solve(normal_OGG, gradient_OG)
        self._keep_if_better("scales_OG", fitted.half().float(), (fitted.half() > 0).all(1) & fitted.half().isfinite().all(1))

    def shift_zeros(self, zero_steps: int) -> None:
        """A group's zero point by d codes: all its weights change by `-s d`, best where `-s d = (E H 1) / (1^T H 1)`."""
        before, unit = self.zeros_OG, grid.ZERO_STEPS // zero_steps
        self.zeros_OG = before.clone()
        gradient_OI = self.error() @ self.h_II
        for g in range(self.scales_OG.shape[1]):
            columns = slice(g * self.group_size, (g + 1) * self.group_size)
            sums_I = self.h_II[columns].sum(0)
            change_O = gradient_OI[:, columns].sum(1) / sums_I[columns].sum().clamp(min=1e-20)
            steps_O = torch.round(-change_O / self.scales_OG[:, g] * zero_steps) * unit
            moved_O = (before[:, g] + steps_O).clamp(0, grid.ZERO_STEPS * self.top)
            moved_O = torch.where(before[:, g] % unit == 0, moved_O, before[:, g])  # sign's half step stays
            change_O = -(moved_O - before[:, g]) / grid.ZERO_STEPS * self.scales_OG[:, g]
            self.zeros_OG[:, g] = moved_O
            gradient_OI.addr_(change_O, sums_I, alpha=-1)
        moved, self.zeros_OG = self.zeros_OG, before
        self._keep_if_better("zeros_OG", moved)

    def sweep_codes(self) -> None:
        """Column after column: the code whose value is nearest to `q + (E H)_j / H_jj`, the minimum with the rest fixed."""
        I, group_size = self.w_OI.shape[1], self.group_size
        scale_GO, shift_GO = self.scales_OG.T.contiguous(), (self.zeros_OG / grid.ZERO_STEPS).T.contiguous()
        codes_IO = self.codes_OI.T.contiguous()
        gradient_IO = (self.error() @ self.h_II).T.contiguous()
        diagonal = self.h_II.diagonal()
        for start in range(0, I, BLOCK):
            end = min(start + BLOCK, I)
            local, h_BB = gradient_IO[start:end].clone(), self.h_II[start:end, start:end]
            changes_BO = torch.zeros_like(local)
            for j in range(end - start):
                column, scale, shift = start + j, scale_GO[(start + j) // group_size], shift_GO[(start + j) // group_size]
                value = (codes_IO[column] - shift) * scale + local[j] / diagonal[column]
                code = torch.addcdiv(shift, value, scale).round_().clamp_(0, self.top)
                changes_BO[j] = (code - codes_IO[column]) * scale
                codes_IO[column] = code
                local[j + 1 :].addr_(h_BB[j + 1 :, j], changes_BO[j], alpha=-1)
            gradient_IO.addmm_(self.h_II[:, start:end], changes_BO, alpha=-1)
        self._keep_if_better("codes_OI", codes_IO.T.contiguous())

    def _keep_if_better(self, name: str, found: torch.Tensor, allowed: torch.Tensor | bool = True) -> None:
        """Take a row's new values where they lower its objective: rounding never takes back what a step gained."""
        before, was = self.objective(), getattr(self, name)
        setattr(self, name, found)
        better = (self.objective() < before) & allowed
        setattr(self, name, torch.where(better[:, None], found, was))
