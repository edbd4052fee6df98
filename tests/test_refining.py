"""Each step of the refinement against a slow, obvious version, and the promise that none makes it worse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.quantization import grid
from moepress.quantization.gptq import damped, gptq
from moepress.quantization.refining import Rows, refine

GRID = grid.Search(clip_min=0.25, clip_steps=8, fit_rounds=2)


def problem(seed=0, E=1, O=5, I=16, T=100):
    """Random weights and correlated inputs: `[E, O, I]`, curvature `[E, I, I]`."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(E, O, I, generator=generator)
    x = torch.randn(E, T, I, generator=generator) @ torch.randn(E, I, I, generator=generator)
    return w, x.transpose(1, 2) @ x / T


def rows_of(seed=0, bits=2, group_size=8, **shape):
    w, h = problem(seed, **shape)
    q = grid.rtn(w, [bits], group_size, GRID)
    return Rows(w[0], h[0], q.codes[0], q.scales[0], q.zeros[0], 2**bits - 1)


def test_scales_are_the_dense_least_squares():
    """Against numpy's way: whiten by a square root of H, a column a group, one row at a time."""
    rows = rows_of()
    levels, groups = rows.levels(), rows.scales_OG.shape[1]
    root = torch.linalg.cholesky(rows.h_II.double()).T  # H = root^T root
    expected = []
    for w, level in zip(rows.w_OI.double(), levels.double(), strict=True):
        b = torch.zeros(len(w), groups, dtype=torch.float64)
        for i in range(len(w)):
            b[i, i // rows.group_size] = level[i]
        expected.append(torch.linalg.lstsq(root @ b, (root @ w)[:, None]).solution[:, 0])
    before = rows.objective()
    rows.fit_scales()
    expected = torch.stack(expected).float()
    moved = (rows.objective() < before)[:, None]
    assert moved.float().mean() > 0.7
    assert torch.allclose(torch.where(moved, rows.scales_OG, expected), expected, rtol=2e-3)


def slow_sweep(rows: Rows) -> torch.Tensor:
    """Every code of every column in turn, the whole objective anew for each."""
    codes = rows.codes_OI.clone()
    for j in range(codes.shape[1]):
        trials = []
        for code in range(rows.top + 1):
            rows.codes_OI = codes.clone()
            rows.codes_OI[:, j] = code
            trials.append(rows.objective())
        codes[:, j] = torch.stack(trials).argmin(0).float()
    return codes


@pytest.mark.parametrize(("bits", "columns"), [(1, 16), (2, 16), (3, 8), (2, 264)])
def test_sweep_is_the_slow_one(bits, columns):
    """Also where the columns take several blocks."""
    slow, fast = (rows_of(1, bits, I=columns, T=600) for _ in range(2))
    fast.sweep_codes()
    assert torch.equal(fast.codes_OI, slow_sweep(slow))


@pytest.mark.parametrize("group_size", [16, 4])
def test_zero_points_against_every_one(group_size):
    """Group after group: the best of all zero points, with those before it moved and those after it not yet."""
    rows = rows_of(2, bits=2, group_size=group_size)
    rows.zeros_OG = (rows.zeros_OG + 2).clamp(max=12)  # away from where the search had it
    before, expected = rows.zeros_OG, rows.zeros_OG.clone()
    for g in range(before.shape[1]):
        trials = []
        for zero in range(13):
            rows.zeros_OG = expected.clone()
            rows.zeros_OG[:, g] = zero
            trials.append(rows.objective())
        expected[:, g] = torch.stack(trials).argmin(0).float()
    rows.zeros_OG = before
    rows.shift_zeros(4)
    assert torch.equal(rows.zeros_OG, expected) and not torch.equal(expected, before)


def test_reaches_brute_force_on_tiny_codes():
    """Of all 4^4 codes with the grid fixed: repeated sweeps end near the best, and never above where they began."""
    near = []
    for seed in range(20):
        rows = rows_of(seed, bits=2, group_size=4, O=3, I=4)
        begun, found = rows.objective(), rows.codes_OI
        every = []
        for codes in itertools.product(range(4), repeat=4):
            rows.codes_OI = torch.tensor([codes] * 3).float()
            every.append(rows.objective())
        rows.codes_OI = found
        for _ in range(4):
            rows.sweep_codes()
        best, reached = torch.stack(every).amin(0), rows.objective()
        assert (reached <= begun * (1 + 1e-5)).all() and (reached >= best * (1 - 1e-4)).all()
        near.append((reached < 1.0001 * best).float().mean())
    assert sum(near) / len(near) > 0.6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4]), st.booleans()
)
def test_no_step_raises_the_objective(seed, bits, group_size, zero_steps, is_singular):
    w, h = problem(seed)
    if is_singular:
        h[:, :, 3] = h[:, 3] = 0
        damped(h, 0.01)
    how = grid.Search(clip_min=0.25, clip_steps=4, fit_rounds=1, zero_steps=zero_steps)
    q = grid.rtn(w, [bits], group_size, how)
    rows = Rows(w[0], h[0], q.codes[0], q.scales[0], q.zeros[0], 2**bits - 1)
    last = rows.objective()
    for step in (rows.fit_scales, lambda: rows.shift_zeros(zero_steps), rows.sweep_codes) * 2:
        step()
        assert (rows.objective() <= last * (1 + 1e-6) + 1e-9).all()
        last = rows.objective()
    assert rows.codes_OI.min() >= 0 and rows.codes_OI.max() <= 2**bits - 1
    assert (rows.zeros_OG % (4 // zero_steps) == 0).all() and rows.zeros_OG.max() <= 4 * (2**bits - 1)
    assert (rows.scales_OG == rows.scales_OG.half()).all() and (rows.scales_OG > 0).all()


def test_improves_gptq_in_mixed_widths_and_round_trips():
    w, h = problem(3, E=3, O=16, I=64, T=300)
    bits = [1, 2, 3]
    start = gptq(w, h, bits, 16, 0.01, GRID, 16)
    found = refine(w, h, start, 0.01, 2, 4)

    def error(q):
        d = w - q.dequantize()
        return torch.einsum("eoi,eoi->e", d @ h, d)

    assert (error(found) < 0.97 * error(start)).all()
    assert found.bits == bits and found.codes.dtype == torch.uint8 and found.scales.dtype == torch.float16
    assert all(found.codes[e].max() < 2**b for e, b in enumerate(bits))
    assert refine(w, h, start, 0.01, 0, 4) is start
    for e, b in enumerate(bits):  # each matrix: the three steps in turn, under its damped curvature
        by_hand = h[e] + 0.01 * h[e].diagonal().mean() * torch.eye(64)
        rows = Rows(w[e], by_hand, start.codes[e], start.scales[e], start.zeros[e], 2**b - 1)
        for step in (rows.fit_scales, lambda rows=rows: rows.shift_zeros(4), rows.sweep_codes) * 2:
            step()
        assert torch.equal(found.zeros[e].float(), rows.zeros_OG)
        assert torch.equal(found.codes[e].float(), rows.codes_OI) and torch.equal(found.scales[e].float(), rows.scales_OG)


def test_the_curvatures_scale_does_not_matter():
    """Hidden states may be tiny or huge; the damping goes along."""
    w, h = problem(4, O=16)
    start = grid.rtn(w, [2], 8, GRID)
    plain = refine(w, h, start, 0.3, 2, 4)
    for scale in (2.0**-20, 2.0**20):
        found = refine(w, scale * h, start, 0.3, 2, 4)
        assert torch.equal(found.codes, plain.codes) and torch.allclose(found.scales, plain.scales, rtol=1e-3)
