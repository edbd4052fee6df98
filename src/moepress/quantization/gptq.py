"""GPTQ (Frantar et al., arXiv 2210.17323), batched over matrices of any widths.

Minimises `tr((W - Q) H (W - Q)^T)` for the curvature `H = mean x x^T` of each matrix's inputs (the paper's Hessian, up to a
factor): column by column, the rounding error is spread over the columns that are still to come, by the rows of U in
`H^-1 = U^T U`.

Legend: E matrices (experts), O output rows, I input columns, B columns of one block.
"""

from collections.abc import Iterable
from itertools import repeat

import torch

from moepress.quantization import grid
from moepress.quantization.packing import Quantized


class Curvature:
    """Second moments of inputs, accumulated: `sum x x^T` and the count, for E matrices. `sum_EII [E, I, I]`, `count_E [E]`."""

    def __init__(self, num_matrices: int, width: int, device=None):
        self.sum_EII = torch.zeros(num_matrices, width, width, device=device)
        self.count_E = torch.zeros(num_matrices, device=device)

    def add(
        self, matrix: int, x_TI: torch.Tensor, share_T: torch.Tensor | None = None, left_TI: torch.Tensor | None = None
    ) -> None:
        """Add tokens to the sum of one matrix. share: how much each token counts, 1 on average. left: `sum left x^T` is taken
        instead of `sum x x^T`.

        `sum x x^T` is symmetric: for each quarter of its rows only the part up to the diagonal is computed, the rest is copied.
        With few tokens the copying costs more than that saves.
        """
        x, total = x_TI.float(), self.sum_EII[matrix]
        right = x if share_T is None else x * share_T[:, None]
        if left_TI is not None:
            total.addmm_(left_TI.float().T, right)
        else:
            tile = -(-x.shape[1] // (4 if len(x) > 256 else 1))
            for start in range(0, x.shape[1], tile):
                end = start + tile
                total[start:end, :end].addmm_(x[:, start:end].T, right[:, :end])
                total[:start, start:end] = total[start:end, :start].T
        self.count_E[matrix] += x.shape[0]

    def mean(self) -> torch.Tensor:
        """`[E, I, I]`; zeros for a matrix without tokens."""
        return self.sum_EII / self.count_E.clamp(min=1)[:, None, None]


def shrunk(routed: Curvature, prior: Curvature) -> torch.Tensor:
    """`(n H + n0 H0) / (n + n0)`, n0 = the input's width: an expert's curvature, drawn towards the layer's by how few
    tokens it has; with none, the layer's altogether. prior: the layer's, of 1 or E matrices. Returns `[E, I, I]`, in the
    memory of `routed`."""
    width = routed.sum_EII.shape[-1]
    share = width / prior.count_E.clamp(min=1)
    routed.sum_EII.addcmul_(prior.sum_EII, share[:, None, None])
    return routed.sum_EII.div_((routed.count_E + width)[:, None, None])


def asymmetric(
    w_EOI: torch.Tensor,
    drift_EII: torch.Tensor,
    h_EII: torch.Tensor,
    damping: float,
    strength: float,
    factor_EII: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights to approximate so that the output on the quantized stream's input `x_hat` is the original's on `x`.

    `min_Q |W x - Q x_hat|^2` is `min_Q tr((W* - Q) H (W* - Q)^T)` with `W* = W + W D H^-1`, `D = mean (x - x_hat) x_hat^T`
    (drift) and `H = mean x_hat x_hat^T` (GPTAQ, arXiv 2504.02692). strength: of the change, 0 to 1. factor: as of `gptq`. All
    `[E, ., I]`.
    """
    u = inverse_factor(h_EII, damping) if factor_EII is None else factor_EII
    return w_EOI + strength * (w_EOI @ drift_EII) @ u.transpose(1, 2) @ u


def damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    """`H + damping * mean(diag H) * 1`, in the memory of H, `[..., I, I]`. An input that never occurs has only that on its
    diagonal, so it is merely rounded; where none occurs the mean counts as 1."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    return h


def inverse_factor(h_EII: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U `[E, I, I]` with `damped(H)^-1 = U^T U`.

    With both axes reversed `H = L L^T`, so `U = L^-1` reversed back: no inverse of H is formed.
    """
    # one name for each step's result: a large matrix is freed as soon as the next is there
    work = damped(h_EII.float().flip(-1, -2), damping)
    work = torch.linalg.cholesky(work)
    invert_lower(work)
    return work.flip(-1, -2)


def invert_lower(l_EII: torch.Tensor, leaf: int = 256) -> None:
    """Invert lower triangular matrices in place, by halves: `[[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]`."""
    I = l_EII.shape[-1]
    if I <= leaf:  # noqa: SIM300
        one = torch.eye(I, device=l_EII.device, dtype=l_EII.dtype).expand_as(l_EII)
        l_EII.copy_(torch.linalg.solve_triangular(l_EII, one, upper=False))
        return
    half = I // 2
    a, b, c = l_EII[:, :half, :half], l_EII[:, half:, :half], l_EII[:, half:, half:]
    invert_lower(a, leaf)
    invert_lower(c, leaf)
    b.copy_(c @ (b @ a)).neg_()


def gptq(
    w_EOI: torch.Tensor,
    h_EII: torch.Tensor,
    bits: list[int],
    group_size: int,
    damping: float,
    how: grid.Search,
    block_size: int,
    factor_EII: torch.Tensor | None = None,
    act_order: bool = False,
    deferred_bits: int = 0,
) -> Quantized:
    """Quantize E matrices, matrix e to bits[e], each group's grid searched when the group is reached.

    w: `[E, O, I]`. h: curvature `[E, I, I]`. factor: `inverse_factor(h, damping)` where it is known already.
    act_order: columns in the order of falling curvature; groups stay where they are, so their grids are searched beforehand.
    deferred_bits: matrices up to this width get their feedback only after each block, none inside it (as MC's public code
    does; 0 is GPTQ). Without that the result does not depend on block_size (up to rounding), which must divide group_size.
    """
    assert group_size % block_size == 0, (group_size, block_size)
    E, O, I = w_EOI.shape
    w = w_EOI.float().transpose(1, 2).contiguous()  # [E, I, O]: a column's weights lie side by side
    importance = h_EII.diagonal(dim1=-2, dim2=-1).float()
    top = grid.top_code(bits, w.device)
    codes = torch.empty(E, O, I, dtype=torch.uint8, device=w.device)
    scales = torch.empty(E, I // group_size, O, device=w.device)
    zeros = torch.empty(E, I // group_size, O, device=w.device)

    def search(group: int) -> None:
        columns = slice(group * group_size, (group + 1) * group_size)
        found = grid.search(w[:, columns].transpose(1, 2), top, importance[:, columns], how)
        scales[:, group], zeros[:, group] = found

    order_EI = None
    if act_order:
        assert factor_EII is None, "the factor depends on the order"
        for group in range(I // group_size):
            search(group)
        order_EI = importance.argsort(dim=1, descending=True, stable=True)
        rows_E = torch.arange(E, device=w.device)
        w = w[rows_E[:, None], order_EI]
        h_EII = h_EII[rows_E[:, None, None], order_EI[:, :, None], order_EI[:, None, :]]
    u = inverse_factor(h_EII, damping) if factor_EII is None else factor_EII
    now_E11 = torch.tensor([[[float(b > deferred_bits)]] for b in bits], device=w.device)
    for start in range(0, I, block_size):
        end = start + block_size
        grids: Iterable[tuple[torch.Tensor, torch.Tensor]]  # scale and zero point of each column
        if order_EI is None:
            group = start // group_size
            if start % group_size == 0:
                search(group)
            grids = repeat((scales[:, group], zeros[:, group] / grid.ZERO_STEPS), block_size)
        else:
            groups = (order_EI[:, start:end] // group_size).T
            grids = ((scales[rows_E, group_E], zeros[rows_E, group_E] / grid.ZERO_STEPS) for group_E in groups)
        factor = u[:, start:end, start:end]
        rounded, errors = round_block(w[:, start:end], factor, factor * now_E11 if deferred_bits else factor, grids, top)
        codes[:, :, start:end] = rounded.transpose(1, 2)
        w[:, end:].baddbmm_(u[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    if order_EI is not None:
        codes = codes.gather(2, order_EI.argsort(dim=1)[:, None].expand(E, O, I))
    scales, zeros = (part.transpose(1, 2).contiguous() for part in (scales, zeros))
    return Quantized(codes, scales.half(), zeros.to(torch.int16), list(bits))


def round_block(
    block_EBO: torch.Tensor,
    factor_EBB: torch.Tensor,
    within_EBB: torch.Tensor,
    grids: Iterable[tuple[torch.Tensor, torch.Tensor]],
    top_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes, errors)` of a block's columns, `[E, B, O]` both: each is rounded in turn, and its error, over the factor's
    diagonal, is taken from the columns behind it, in the memory of `block`.

    factor: the block's part of U. within: the same where that feedback is given at once, 0 where it waits for the block's end.
    grids: scale and zero point (in codes) of each column, `[E, O]`. top: the highest code.
    """
    errors, rounded = torch.empty_like(block_EBO), torch.empty_like(block_EBO)
    highest_EO = top_E1.expand(block_EBO[:, 0].shape).contiguous()
    for j, (scale, shift) in enumerate(grids):
        column = block_EBO[:, j]
        code = torch.addcdiv(shift, column, scale).round_().clamp_(min=0)
        rounded[:, j] = torch.minimum(code, highest_EO, out=code)
        errors[:, j] = column - (code - shift) * scale
        errors[:, j] /= factor_EBB[:, j, j, None]
        block_EBO[:, j + 1 :].baddbmm_(within_EBB[:, j, j + 1 :, None], errors[:, j, None, :], alpha=-1)
    return rounded, errors
