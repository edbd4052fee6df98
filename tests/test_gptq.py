"""Grid and error feedback against slow, obvious versions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.quantization import grid
from moepress.quantization.gptq import Curvature, asymmetric, gptq, inverse_factor, invert_lower, shrunk

GRID = grid.Search(clip_min=0.25, clip_steps=8, fit_rounds=2)


def output_error(w_EOI: torch.Tensor, q_EOI: torch.Tensor, h_EII: torch.Tensor) -> torch.Tensor:
    """Relative squared error of the outputs under the curvature, `tr(D H D^T) / tr(W H W^T)` with D = W - Q: `[E]`."""
    d = w_EOI.float() - q_EOI.float()
    error = torch.einsum("eoi,eoi->e", d @ h_EII, d)
    return error / torch.einsum("eoi,eoi->e", w_EOI.float() @ h_EII, w_EOI.float()).clamp(min=1e-30)


def problem(seed=0, E=3, O=8, I=32, T=200):
    """Random weights and correlated inputs: `[E, O, I]`, curvature `[E, I, I]`."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(E, O, I, generator=generator)
    x = torch.randn(E, T, I, generator=generator) @ torch.randn(E, I, I, generator=generator)
    return w, x.transpose(1, 2) @ x / T


def slow_gptq(w, h, bits, group_size, damping, order=None):
    """One matrix, one column at a time, the inverse updated by elimination (OBS), no blocks and no Cholesky.

    order: of the columns, in which case every group's grid is that of the weights before any feedback."""
    w, top, grids = w.clone().double(), grid.top_code([bits]), {}

    def search(group):
        columns = slice(group * group_size, (group + 1) * group_size)
        grids[group] = grid.search(w[None, :, columns], top, h.diagonal()[None, columns], GRID)

    for group in range(w.shape[1] // group_size if order is not None else 0):
        search(group)
    inverse = torch.linalg.inv(h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h)))
    out = torch.empty_like(w)
    for j in range(w.shape[1]) if order is None else order:
        if j // group_size not in grids:
            search(j // group_size)
        out[:, j] = grid.round_to_grid(w[None, :, j : j + 1].float(), *grids[j // group_size], top)[1][0, :, 0]
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j][None]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out.float()


def test_batched_mixed_widths_against_the_slow_one():
    w, h = problem()
    bits = [2, 3, 4]
    fast = gptq(w, h, bits, 16, 0.01, GRID, 8).dequantize()
    for e, b in enumerate(bits):
        slow = slow_gptq(w[e], h[e], b, 16, 0.01)
        assert (fast[e] - slow).abs().max() < 1e-2 * slow.abs().max() or (fast[e] != slow).float().mean() < 0.02


def test_block_size_changes_nothing():
    w, h = problem(1)
    results = [gptq(w, h, [3] * 3, 16, 0.01, GRID, b).dequantize() for b in (1, 4, 16)]
    for other in results[1:]:
        assert (results[0] != other).float().mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_feedback_beats_rounding(bits):
    w, h = problem(2, E=4)
    feedback = output_error(w, gptq(w, h, [bits] * 4, 16, 0.01, GRID, 16).dequantize(), h)
    rounding = output_error(w, grid.rtn(w, [bits] * 4, 16, GRID).dequantize(), h)
    assert (feedback < rounding).all()


def test_diagonal_curvature_is_rounding():
    """With uncorrelated inputs there is nothing to feed back, so GPTQ is RTN under the same importance."""
    w, _ = problem(3)
    h = torch.eye(32).expand(3, 32, 32)
    assert torch.equal(gptq(w, h, [2, 3, 4], 16, 0.01, GRID, 16).codes, grid.rtn(w, [2, 3, 4], 16, GRID).codes)


def test_inverse_factor():
    _, h = problem(4)
    u = inverse_factor(h, 0.1)
    assert torch.equal(u, u.triu())
    damped = h + 0.1 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(32)
    assert torch.allclose(u.transpose(1, 2) @ u @ damped, torch.eye(32).expand(3, 32, 32), atol=1e-3)


@pytest.mark.parametrize(("width", "leaf"), [(8, 8), (16, 4), (13, 3)])
def test_inverse_by_halves(width, leaf):
    """Also where the halves are not equal."""
    lower = torch.randn(3, width, width, generator=torch.Generator().manual_seed(18)).tril(-1) + 2 * torch.eye(width)
    inverse = lower.clone()
    invert_lower(inverse, leaf)
    assert torch.allclose(inverse @ lower, torch.eye(width).expand(3, width, width), atol=1e-4)
    assert torch.equal(inverse, inverse.tril())


def test_the_curvatures_scale_does_not_matter():
    """Hidden states may be tiny or huge; the damping goes along. Powers of two, so that nothing is rounded otherwise."""
    w, h = problem(17)
    plain = gptq(w, h, [2, 3, 4], 16, 0.1, GRID, 8)
    for scale in (2.0**-30, 2.0**30):
        found = gptq(w, scale * h, [2, 3, 4], 16, 0.1, GRID, 8)
        assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)


def test_inputs_that_never_occur():
    """A singular curvature, even an all-zero one, still gives a sound quantization."""
    w, h = problem(5)
    h[:, :, 5] = h[:, 5] = 0
    h[2] = 0
    out = gptq(w, h, [3] * 3, 16, 0.01, GRID, 16).dequantize()
    assert out.isfinite().all() and ((out - w).square().mean() < 0.2 * w.square().mean())


def test_search_against_every_pair():
    """Search and fit never lose to no clipping, and on the whole beat every pair of the search's ends."""
    generator = torch.Generator().manual_seed(6)
    w = torch.randn(1, 200, 32, generator=generator) ** 3
    importance = torch.rand(1, 32, generator=generator)
    for bits in (1, 2, 3, 4):
        top = grid.top_code([bits])

        def error(scale, zero, top=top):
            return ((grid.round_to_grid(w, scale, zero, top)[1] - w).square() * importance).sum(-1)

        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        ratios = torch.linspace(1, 0.25, 8)
        every = torch.stack([error(*grid.fit(a * low, b * high, top.item())) for a, b in itertools.product(ratios, ratios)])
        found = error(*grid.search(w, top, importance, GRID))
        assert (found <= error(*grid.fit(low, high, top.item())) + 1e-6).all()
        assert found.sum() <= every.amin(0).sum()


def test_one_bit_is_at_least_sign_times_mean():
    w = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(7))
    by_sign = (w.sign() * w.abs().mean(-1, keepdim=True) - w).square().sum()
    ours = (grid.rtn(w, [1], 128, GRID).dequantize() - w).square().sum()
    assert ours < 1.02 * by_sign


@pytest.mark.parametrize(("bits", "relative"), [(2, 0.125), (3, 0.038), (4, 0.012)])
def test_gaussian_error_is_near_the_wide_search_figures(bits, relative):
    """Relative squared error of Gaussian weights in groups of 128: a wide search reaches .115 at 2 and .033 at 3 bits,
    min-max rounding .25 and .047."""
    w = torch.randn(1, 256, 512, generator=torch.Generator().manual_seed(8))
    error = (grid.rtn(w, [bits], 128, GRID).dequantize() - w).square().mean()
    assert error < relative


def test_minmax_against_the_formula():
    """MC's own rounding, weight by weight, 0 on every grid; and its relative squared error on Gaussian weights, far above a
    searched grid's."""
    w = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(10))
    w[1:, 1], w[1:, 2] = 1 + w[1:, 1].abs(), -1 - w[1:, 2].abs()
    found = grid.minmax(w, [1, 2, 3, 4], 32).dequantize()
    for e, o, start in itertools.product(range(4), range(3), (0, 32)):
        group = w[e, o, start : start + 32]
        if e == 0:
            expected = group.sign() * group.abs().mean()
        else:
            low, high, top = group.min().clamp(max=0), group.max().clamp(min=0), 2 ** (e + 1) - 1
            scale = ((high - low) / top).half().float()
            zero = (-low / scale * 4).round() / 4
            expected = ((group / scale + zero).round().clamp(0, top) - zero) * scale
        assert torch.allclose(found[e, o, start : start + 32], expected, atol=2e-3)
    w = torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(8))
    errors = (grid.minmax(w, [1, 2, 3, 4], 128).dequantize() - w).square().mean((1, 2))
    assert errors[:3].tolist() == pytest.approx([0.363, 0.25, 0.047], rel=0.1)


@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_a_few_rows_at_a_time_give_the_same(norm, monkeypatch):
    how = grid.Search(0.25, 8, 2, clip_norm=norm)
    w = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(19))
    whole = grid.rtn(w, [2, 3], 16, how)
    monkeypatch.setattr(grid, "ELEMENTS_AT_ONCE", 5 * 16)
    in_pieces = grid.rtn(w, [2, 3], 16, how)
    assert all(torch.equal(getattr(whole, name), getattr(in_pieces, name)) for name in ("codes", "scales", "zeros"))


def test_constant_and_zero_groups():
    for value in (0.0, 1.0, -2.5):
        w = torch.full((1, 4, 32), value)
        out = grid.rtn(w, [3], 16, GRID).dequantize()
        assert torch.allclose(out, w, rtol=2e-3)


@settings(deadline=None)
@given(width=st.integers(1, 700), tokens=st.sampled_from([1, 40, 300]), is_shared=st.booleans(), seed=st.integers(0, 9))
def test_curvature_in_tiles_is_the_whole_product(width, tokens, is_shared, seed):
    g = torch.Generator().manual_seed(seed)
    x, share = torch.randn(tokens, width, generator=g), torch.rand(tokens, generator=g) if is_shared else None
    found = Curvature(2, width)
    found.add(1, x, share)
    found.add(1, x[:1])
    whole = x.T @ (x if share is None else share[:, None] * x) + torch.outer(x[0], x[0])
    assert torch.allclose(found.sum_EII[1], whole, atol=1e-4) and not found.sum_EII[0].any()


def test_curvature_accumulates_and_shrinks():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(9))
    routed, layer = Curvature(3, 8), Curvature(1, 8)
    layer.add(0, x)
    routed.add(0, x[:20])
    routed.add(0, x[20:30])
    routed.add(1, x[:1])
    assert torch.allclose(routed.mean()[0], x[:30].T @ x[:30] / 30, atol=1e-5)
    h = shrunk(routed, layer)
    assert torch.allclose(h[2], layer.mean()[0])  # no token: the layer's altogether
    assert torch.allclose(h[1], (torch.outer(x[0], x[0]) + 8 * layer.mean()[0]) / 9, atol=1e-5)


def test_starved_experts_are_nearly_as_good_as_fully_sampled_ones():
    """Output error on held-out tokens at 2 bits: an expert with few tokens, or none, is saved by the layer's curvature."""
    g, width = torch.Generator().manual_seed(0), 128
    basis = torch.randn(width, width, generator=g) * torch.linspace(2, 0.05, width)[:, None]  # correlated, as hidden states are
    layer_tokens = torch.randn(8192, width, generator=g) @ basis
    own = torch.eye(width) + 0.1 * torch.randn(width, width, generator=g) / width**0.5  # what this expert sees is its own
    tokens, held_out = ((torch.randn(n, width, generator=g) @ basis) @ own for n in (4096, 4096))
    w = torch.randn(1, 256, width, generator=g)
    layer = Curvature(1, width)
    layer.add(0, layer_tokens)

    def error(count: int, is_shrunk: bool = True, feedback: bool = True) -> float:
        routed = Curvature(1, width)
        routed.add(0, tokens[:count])
        h = shrunk(routed, layer) if is_shrunk else routed.mean()
        quantized = gptq(w, h, [2], 32, 0.01, GRID, 32) if feedback else grid.rtn(w, [2], 32, GRID)
        return output_error(w, quantized.dequantize(), (held_out.T @ held_out / len(held_out))[None]).item()

    full = error(4096)
    assert error(60, is_shrunk=False) > 2 * full, "few tokens alone mislead, more than rounding does"
    assert error(60) < 1.1 * full and error(0) < 1.1 * full, "with the layer's curvature, few or none"
    assert error(0, feedback=False) > 1.5 * full, "rounding, which reads no tokens"


def test_act_order_is_gptq_of_sorted_columns():
    """With a group for the whole row the static grids are the plain ones: sort, quantize, put back."""
    w, h = problem(10)
    found = gptq(w, h, [2, 3, 4], 32, 0.01, GRID, 8, act_order=True)
    for e, b in enumerate([2, 3, 4]):
        order = h[e].diagonal().argsort(descending=True)
        plain = gptq(w[e : e + 1, :, order], h[e : e + 1, order][:, :, order], [b], 32, 0.01, GRID, 8)
        assert (found.codes[e][:, order] != plain.codes[0]).float().mean() < 0.01
        assert torch.equal(found.zeros[e], plain.zeros[0])


def test_act_order_keeps_groups_where_they_are():
    """Static groups: each group's grid is that of the weights before any feedback."""
    w, h = problem(11)
    found, top = gptq(w, h, [3] * 3, 8, 0.01, GRID, 8, act_order=True), grid.top_code([3] * 3)
    importance = h.diagonal(dim1=-2, dim2=-1)
    for group in range(4):
        columns = slice(8 * group, 8 * group + 8)
        scale, zero = grid.search(w[:, :, columns], top, importance[:, columns], GRID)
        assert torch.equal(found.scales[:, :, group], scale.half()) and torch.equal(
            found.zeros[:, :, group], zero.to(torch.int16)
        )


def test_act_order_over_several_groups_against_the_slow_one():
    w, h = problem(11)
    bits = [2, 3, 4]
    found = gptq(w, h, bits, 8, 0.01, GRID, 8, act_order=True).dequantize()
    for e, b in enumerate(bits):
        order = h[e].diagonal().argsort(descending=True).tolist()
        assert order != sorted(order)
        slow = slow_gptq(w[e], h[e], b, 8, 0.01, order)
        assert (found[e] - slow).abs().max() < 1e-2 * slow.abs().max() or (found[e] != slow).float().mean() < 0.02


def test_deferred_feedback_is_rounding_inside_a_block():
    """MC's public code: a block alone is merely rounded, at 3 bits and less; above, nothing changes."""
    w, h = problem(12)
    one_block = gptq(w, h, [2, 3, 4], 32, 0.01, GRID, 32, deferred_bits=3)
    plain = gptq(w, h, [2, 3, 4], 32, 0.01, GRID, 32)
    top = grid.top_code([2, 3, 4])
    scale, zero = grid.search(w, top, h.diagonal(dim1=-2, dim2=-1), GRID)
    rounded = grid.round_to_grid(w, scale, zero, top)[0]
    assert torch.equal(one_block.codes[:2], rounded[:2].to(torch.uint8)) and torch.equal(one_block.codes[2], plain.codes[2])
    deferred = gptq(w, h, [2] * 3, 8, 0.01, GRID, 8, deferred_bits=3)  # between blocks there is feedback
    assert (output_error(w, deferred.dequantize(), h) < output_error(w, grid.rtn(w, [2] * 3, 8, GRID).dequantize(), h)).all()


def test_asymmetric_target_is_the_least_squares_of_the_original_output():
    g = torch.Generator().manual_seed(13)
    w, x = torch.randn(1, 8, 32, generator=g), torch.randn(300, 32, generator=g)
    x_hat = x + 0.3 * torch.randn(300, 32, generator=g)
    h, drift = (x_hat.T @ x_hat)[None] / 300, ((x - x_hat).T @ x_hat)[None] / 300
    best = torch.linalg.lstsq(x_hat, x @ w[0].T).solution.T
    assert torch.allclose(asymmetric(w, drift, h, 1e-7, 1.0)[0], best, atol=1e-3)
    assert torch.equal(asymmetric(w, drift, h, 0.01, 0.0), w)
    known = inverse_factor(h, 0.01)
    assert torch.equal(asymmetric(w, drift, h, 0.01, 0.5, known), asymmetric(w, drift, h, 0.01, 0.5))


def test_one_bit_as_sign_leaves_a_group_of_zeros_at_zero():
    """Scale 1 and zero point 0, as on every other grid, and not half a step below zero."""
    w = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(20))
    w[0, :, 32:] = 0
    for found in (grid.rtn(w, [1], 32, grid.Search(0.25, 8, 2, one_bit="sign")), grid.minmax(w, [1], 32)):
        assert (found.dequantize()[..., 32:] == 0).all() and (found.dequantize()[..., :32] != 0).all()
        assert found.zeros[0, 0].tolist() == [2, 0] and (found.scales[..., 1] == 1).all()


def test_min_max_grid_has_whole_zero_points_and_both_ends():
    how = grid.Search(clip_min=1.0, clip_steps=1, fit_rounds=0, zero_steps=1)
    w = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(14))
    found = grid.rtn(w, [3], 32, how)
    assert (found.zeros % 4 == 0).all()
    expected = ((w.amax(-1) - w.amin(-1)) / 7).half()
    assert torch.equal(found.scales[..., 0], expected)


@pytest.mark.parametrize("norm", [1.0, 2.4])
def test_search_under_another_norm_against_every_trial(norm):
    """Both ends by the same factor: MC's search, with factors above 1."""
    how = grid.Search(0.9, 21, 0, clip_max=1.1, clip_ends="together", clip_norm=norm, clip_weighted=False)
    w, top = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(15)), grid.top_code([2])
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)

    def error(scale, zero):
        return (grid.round_to_grid(w, scale, zero, top)[1] - w).abs().pow(norm).sum(-1)

    every = torch.stack([error(*grid.fit(p * low, p * high, 3.0)) for p in torch.linspace(1.1, 0.9, 21)])
    found = error(*grid.search(w, top, torch.rand(1, 32), how))
    assert torch.allclose(found, every.amin(0), rtol=1e-4)


def test_one_bit_as_sign_and_scale():
    """The matrix of one bit alone; one of three beside it is on its grid."""
    w = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(16))
    found = grid.rtn(w, [1, 3], 64, grid.Search(0.25, 8, 2, one_bit="sign")).dequantize()
    assert torch.allclose(found[0], w[0].sign() * w[0].abs().mean(-1, keepdim=True), rtol=1e-3)
    assert torch.equal(found[1], grid.rtn(w[1:], [3], 64, GRID).dequantize()[0])
