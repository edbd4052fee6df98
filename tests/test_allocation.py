"""The integer program against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress import allocation


def brute_force(cost, widths, sizes, budget, keep):
    best, least = None, np.inf
    for choice in itertools.product(range(len(widths)), repeat=len(cost)):
        bits = [widths[j] for j in choice]
        if sum(sizes[j] for j in choice) > budget + 1e-9 or not set(keep) <= set(bits):
            continue
        total = sum(cost[i, j] for i, j in enumerate(choice))
        if total < least:
            best, least = bits, total
    return best, least


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([(), (2,), (2, 3)]), st.floats(1, 4))
def test_solve_against_brute_force(experts, seed, keep, mean):
    widths = [1, 2, 3, 4]
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.random((experts, 4)) ** 4, axis=1)[:, ::-1] * rng.random((experts, 1)) * 1e-6
    sizes = [10 * w + 3 for w in widths]
    budget = mean * experts * 10 + 3 * experts
    expected, least = brute_force(cost, widths, sizes, budget, keep)
    if expected is None:
        with pytest.raises(ValueError, match="can be met"):
            allocation.solve(cost, widths, sizes, budget, keep)
        return
    found = allocation.solve(cost, widths, sizes, budget, keep)
    assert found.objective == pytest.approx(least, rel=1e-6)
    assert sum(cost[i, widths.index(w)] for i, w in enumerate(found.bits)) == pytest.approx(least, rel=1e-6)
    assert found.bound <= found.objective * (1 + 1e-9) and found.gap <= 1e-6


def test_important_experts_get_more_bits():
    errors = np.array([[8.0, 4.0, 2.0, 1.0]] * 4)
    statistics = [{"frequency": [0.9, 0.5, 0.3, 0.3], "weight": [0.5, 0.3, 0.1, 0.1], "errors": errors.tolist()}]
    settings = {
        "widths": [1, 2, 3, 4],
        "keep": [2, 3],
        "weights": "renormalized",
        "frequency_exponent": 1.0,
        "weight_exponent": 1.0,
        "error_exponent": 2.0,
    }
    (solution,) = allocation.pmq(statistics, settings, [1, 2, 3, 4], [1, 2, 3, 4], 10)
    assert solution.bits == sorted(solution.bits, reverse=True) and sum(solution.bits) == 10
    with pytest.raises(ValueError, match=r"statistics\.widths"):
        allocation.pmq(statistics, settings, [2, 3], [1, 2, 3, 4], 10)


def test_cost_is_the_papers():
    cost = allocation.pmq_cost([1.0, 3.0], [0.2, 0.6], [[2.0, 1.0], [4.0, 3.0]], 1.0, 2.0, 2.0)
    assert np.allclose(cost, [[0.25 * 0.25**2 * 4, 0.25 * 0.25**2], [0.75 * 0.75**2 * 16, 0.75 * 0.75**2 * 9]])


@given(st.floats(1, 1000), st.integers(1, 40))
def test_shares_add_up(total, layers):
    shares = allocation.shares(total, layers)
    assert sum(shares) == pytest.approx(np.floor(total + 1e-9)) and max(shares) - min(shares) <= 1
