"""The compiled search for a grid against its twin in torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.quantization import grid, grid_cpu


def errors(w, top, weight, scale, zero):
    """Of each row, in float64."""
    z = w.double() / scale.double()[..., None] + zero.double()[..., None] / grid.ZERO_STEPS
    off = z.round().clamp(min=0).minimum(top.double()[..., None]) - z
    return scale.double().square() * (off.square() * weight.double()[:, None]).sum(-1)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    ends=st.sampled_from(["apart", "together"]),
    zero_steps=st.sampled_from([1, 2, 4]),
    clip_max=st.sampled_from([1.0, 1.2]),
    fit_rounds=st.integers(0, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_as_good_as_by_torch(bits, rows, columns, scale, ends, zero_steps, clip_max, fit_rounds, weighted, seed):
    torch.manual_seed(seed)
    w = scale * torch.randn(len(bits), rows, columns)
    w[:, 0] = 0  # a row of zeros
    weight = torch.rand(len(bits), columns) + 0.01
    how = grid.Search(0.4, 8, fit_rounds, clip_max, ends, zero_steps=zero_steps)
    top = grid.top_code(bits)
    given_weight = weight if weighted else None
    ours, twins = grid_cpu.search(w, top, given_weight, how), grid.search_by_torch(w, top, given_weight, how)
    weight = weight if weighted else torch.ones_like(weight)
    ours_error, twins_error = errors(w, top, weight, *ours), errors(w, top, weight, *twins)
    assert ours[0].equal(ours[0].half().float()) and (ours[0] > 0).all()
    assert ours[1].equal(ours[1].round()) and (ours[1] >= 0).all() and (ours[1] <= grid.ZERO_STEPS * top).all()
    floor = 1e-9 * w.square().sum().double()
    # A trial that ties to rounding may go either way, and what is tried next follows from it: rarely, and for better or worse.
    torch.testing.assert_close(ours_error.sum() + floor, twins_error.sum() + floor, rtol=0.02, atol=0)
    same = (ours_error - twins_error).abs() <= 1e-3 * twins_error + floor
    assert same.double().mean() >= (0.9 if rows >= 20 else 0)


@pytest.mark.parametrize("ends", ["apart", "together"])
def test_the_very_same_for_nearly_all_rows(ends):
    torch.manual_seed(0)
    w, weight, top = torch.randn(4, 256, 64), torch.rand(4, 64) + 0.1, grid.top_code([1, 2, 3, 4])
    how = grid.Search(0.4, 16, 2, clip_ends=ends)
    ours, twins = grid_cpu.search(w, top, weight, how), grid.search_by_torch(w, top, weight, how)
    same = (ours[0] == twins[0]) & (ours[1] == twins[1])
    assert same.double().mean() > 0.99


def test_any_number_of_threads_gives_the_same(monkeypatch):
    w, weight, top = torch.randn(3, 200, 32), torch.rand(3, 32), grid.top_code([2, 3, 4])
    how = grid.Search(0.4, 8, 2)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(grid_cpu.search(w, top, weight, how))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


@settings(deadline=None, max_examples=300)
@given(st.floats(0, 1e5, width=32))
def test_half_as_numpy_has_it(x):
    with np.errstate(over="ignore"):
        assert grid_cpu.half(np.float32(x)) == np.float32(np.float16(x))


@pytest.mark.parametrize(
    "x", [0, 2**-25, 1.5 * 2**-24, 2**-14 - 2**-25, 2**-14, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519, 65520]
)
def test_half_where_it_is_delicate(x):
    with np.errstate(over="ignore"):
        assert grid_cpu.half(np.float32(x)) == np.float32(np.float16(np.float32(x)))


def test_other_norms_and_signs_go_by_torch(monkeypatch):
    w, weight, top = torch.randn(1, 8, 16), torch.rand(1, 16), grid.top_code([1])
    monkeypatch.setattr(grid_cpu, "search", None)
    for how in (grid.Search(0.4, 8, 2, clip_norm=2.4), grid.Search(0.4, 8, 2, one_bit="sign")):
        assert all(map(torch.equal, grid.search(w, top, weight, how), grid.search_by_torch(w, top, weight, how)))
    with pytest.raises(TypeError):
        grid.search(w, top, weight, grid.Search(0.4, 8, 2))
