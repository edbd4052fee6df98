"""Every rule of allocation against brute force on small instances, and what it promises on any."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_experiment
from moepress import allocation, artefacts, config, dag
from moepress.quantization.size import mixed
from moepress.schema import SCHEMA
from moepress.schema.allocation import reads_statistics

METHODS = sorted(SCHEMA["allocation"])
WIDTHS = [1, 2, 3, 4]
SIZES = {width: 10 * width + 3 for width in (1, 2, 3, 4, 8)}
CHOICES = [WIDTHS, [1, 3, 4], [2, 4], [4, 1, 3]]
"""Widths to choose among: neither sorted nor evenly spaced, nor all that were measured."""


@cache
def shipped(method):
    return config.values([f"allocation={method}"])["allocation"]


def chosen(method, **changes):
    """A rule's settings as conf/allocation/ has them."""
    return shipped(method) | changes


def statistics_of(seed, layers=2, experts=4, widths=WIDTHS):
    """Numbers of a kind that the stage might have measured, falling with the width."""
    rng = np.random.default_rng(seed)

    def falling(*shape):
        return (np.sort(rng.random((*shape, len(widths))) ** 3, -1)[..., ::-1] * 0.9 + 0.1) * rng.random((*shape, 1)) ** 2

    each = []
    for _ in range(layers):
        each.append({name: rng.random(experts).tolist() for name in ("frequency", "weight", "softmax_weight")})
        each[-1] |= {name: falling(experts).tolist() for name in ("errors", "loss_errors")}
        each[-1]["weight_errors"] = np.stack([falling(experts), falling(experts)], -1).tolist()
        each[-1]["traces"] = rng.random((experts, 2)).tolist()
        each[-1]["layer_errors"] = falling(1)[0].tolist()
    return {"widths": widths, "layers": each}


def brute_force(cost, widths, sizes, budget, keep, layers=1):
    """The cheapest of all allocations that fit, layer-major."""
    best, least = None, np.inf
    for choice in itertools.product(range(len(widths)), repeat=len(cost)):
        bits = [widths[j] for j in choice]
        each = len(bits) // layers
        kept = all(set(keep) <= set(bits[at : at + each]) for at in range(0, len(bits), each))
        if sum(sizes[j] for j in choice) > budget + 1e-9 or not kept:
            continue
        total = sum(cost[i][j] for i, j in enumerate(choice))
        if total < least:
            best, least = bits, total
    return best, least


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 3),
    st.integers(1, 2),
    st.integers(0, 10**6),
    st.sampled_from([(w, w[:kept]) for w in CHOICES for kept in range(3)]),
    st.floats(1, 4),
)
def test_solve_against_brute_force(experts, layers, seed, choice, mean):
    (widths, keep), rng, N = choice, np.random.default_rng(seed), experts * layers
    cost = np.sort(rng.random((N, len(widths))) ** 4, axis=1)[:, ::-1] * rng.random((N, 1)) * 1e-6
    sizes = [10 * w + 3 for w in widths]
    budget = mean * N * 10 + 3 * N
    expected, least = brute_force(cost, widths, sizes, budget, keep, layers)
    if expected is None:
        with pytest.raises(ValueError, match="can be met"):
            allocation.solve(cost, widths, sizes, budget, keep, layers)
        return
    found = allocation.solve(cost, widths, sizes, budget, keep, layers)
    assert found.objective == pytest.approx(least, rel=1e-6)
    assert sum(cost[i, widths.index(w)] for i, w in enumerate(found.bits)) == pytest.approx(least, rel=1e-6)
    assert found.bound <= found.objective * (1 + 1e-9) and found.gap <= 1e-6


def cost_by_hand(method, layer, e, j):
    """What each rule says of one expert at one width, from its definition. phi, w: shares of the layer's sum."""
    phi, w, softmax = (layer[name][e] / sum(layer[name]) for name in ("frequency", "weight", "softmax_weight"))
    eps = layer["errors"][e][j]
    return {
        "pmq": phi * w * eps**2,
        "pmq_code": phi * softmax**1.5 * eps,
        "frequency": phi * 4.0 ** -WIDTHS[j],
        "weight": w * 4.0 ** -WIDTHS[j],
        "hessian": sum(t * d for t, d in zip(layer["traces"][e], layer["weight_errors"][e][j], strict=True)),
        "global": layer["loss_errors"][e][j],
    }[method]


BY_LAYER = [method for method in METHODS if method not in ("uniform", "half", "random", "bsp", "global")]


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [None, *CHOICES[1:]])
@pytest.mark.parametrize("method", BY_LAYER)
def test_rules_by_layer_against_brute_force(method, widths, seed, in_bytes):
    rule, statistics = chosen(method, **({"widths": widths, "keep": widths[-1:]} if widths else {})), statistics_of(seed)
    sizes = SIZES if in_bytes else {width: width for width in SIZES}
    total = (10 if in_bytes else 1) * 2 * (10 + 2 * seed) + (
        2 * 4 * 3 + 9 if in_bytes else 0
    )  # in bytes 9 that nothing fits in
    bits, solutions = allocation.allocate(rule, 2, 4, sizes, total, statistics)
    assert sum(sizes[w] for layer in bits for w in layer) <= total and [s.bits for s in solutions] == bits
    for layer, own in zip(statistics["layers"], bits, strict=True):
        cost = [[cost_by_hand(method, layer, e, WIDTHS.index(w)) for w in rule["widths"]] for e in range(4)]
        _, least = brute_force(cost, rule["widths"], [sizes[w] for w in rule["widths"]], total / 2, rule["keep"])
        assert sum(cost[e][rule["widths"].index(w)] for e, w in enumerate(own)) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("widths", CHOICES)
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_global_against_brute_force(seed, keeps, widths):
    statistics = statistics_of(seed, layers=3, experts=2)
    keep, sizes = (sorted(widths)[-2:] if keeps else []), [SIZES[w] for w in widths]
    total = 3 * (SIZES[3] + SIZES[4]) + (5 if keeps else -47)
    rule = chosen("global", widths=widths, keep=keep, gap=1e-9)
    (found,) = allocation.allocate(rule, 3, 2, SIZES, total, statistics)[1]
    columns = [WIDTHS.index(width) for width in widths]
    cost = [[cost_by_hand("global", layer, e, j) for j in columns] for layer in statistics["layers"] for e in range(2)]
    _, least = brute_force(cost, widths, sizes, total, keep, layers=3)
    assert found.objective == pytest.approx(least, rel=1e-6)


def test_global_moves_bits_between_layers():
    statistics = statistics_of(0)
    for scale, layer in zip((100, 1), statistics["layers"], strict=True):
        layer["loss_errors"] = [[scale * 4.0**-w for w in WIDTHS]] * 4
    bits, _ = allocation.allocate(chosen("global"), 2, 4, {w: w for w in WIDTHS}, 20, statistics)
    assert bits == [[4] * 4, [1] * 4]


@pytest.mark.parametrize("widths", CHOICES)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_against_brute_force(seed, widths):
    statistics = statistics_of(seed, layers=5)
    bits, (found,) = allocation.allocate(chosen("bsp", widths=widths), 5, 4, SIZES, 20 * 29 - 7, statistics)
    cost = [[layer["layer_errors"][WIDTHS.index(width)] for width in widths] for layer in statistics["layers"]]
    expected, least = brute_force(cost, widths, [4 * SIZES[w] for w in widths], 20 * 29 - 7, ())
    assert bits == [[width] * 4 for width in expected] and found.objective == pytest.approx(least)


def test_half_is_the_papers_and_meets_any_average():
    rule, bits_are_sizes = chosen("half"), {w: w for w in (1, 2, 3, 4, 8)}

    def found(average, layers, experts):
        return allocation.allocate(rule, layers, experts, bits_are_sizes, average * layers * experts)[0]

    assert found(2.5, 4, 3) == [[3] * 3] * 2 + [[2] * 3] * 2, "the first half at 3, the rest at 2"
    assert found(2.25, 4, 3) == [[3] * 3] + [[2] * 3] * 3
    assert found(2.5, 3, 4) == [[3] * 4, [3, 3, 2, 2], [2] * 4], "a layer at the border is split"
    assert found(3, 2, 2) == [[3, 3]] * 2 and found(6, 2, 2) == [[8, 8], [4, 4]]


def test_uniform_is_the_widest_that_fits():
    for budget in range(8 * 13, 8 * 90, 7):
        (width,) = {w for layer in allocation.allocate(chosen("uniform"), 2, 4, SIZES, budget)[0] for w in layer}
        assert width == max(w for w in SIZES if 8 * SIZES[w] <= budget)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(0, 10**6),
    st.sampled_from([(w, w[:kept]) for w in CHOICES for kept in range(3)]),
    st.floats(0, 1),
    st.booleans(),
)
def test_random_fills_the_budget(experts, seed, choice, part, in_bytes):
    widths, keep = choice
    size = {w: 10 * w + 3 if in_bytes else w for w in widths}
    sizes = [size[w] for w in widths]
    low, high = allocation.feasible_range(experts, widths, sizes, keep)
    budget = low + part * (high - low)
    found = allocation.random_widths(np.random.default_rng(seed), experts, widths, sizes, budget, keep)
    room = budget - sum(size[w] for w in found)
    assert len(found) == experts and set(keep) <= set(found) and room > -1e-9
    for width in found:
        wider = min((w for w in widths if w > width), default=None)
        is_needed = width in keep and found.count(width) == 1
        assert wider is None or is_needed or size[wider] - size[width] > room - 1e-6, "another step would not fit"


def test_random_reaches_every_full_allocation_and_follows_its_seed():
    rule = chosen("random", keep=[2])
    every = {c for c in itertools.product(WIDTHS, repeat=3) if sum(c) == 7 and 2 in c}
    found = [allocation.allocate(rule | {"seed": seed}, 2, 3, {w: w for w in WIDTHS}, 14)[0] for seed in (*range(200), 0)]
    assert {tuple(layer) for bits in found for layer in bits} == every
    assert found[0] == found[-1] and any(bits[0] != bits[1] for bits in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2 * 4 * 21, 2 * 4 * 25, 2 * 4 * 26 + 7, 2 * 4 * 33])
def test_every_rule_honours_bytes(method, budget):
    """Within the budget; and no expert could be wider, where the rule goes by experts."""
    rule, statistics = chosen(method), statistics_of(1) if reads_statistics(chosen(method)) else None
    sizes = {w: SIZES[w] for w in rule.get("widths", SIZES)}
    bits, _ = allocation.allocate(rule, 2, 4, sizes, budget, statistics)
    used = [width for layer in bits for width in layer]
    spent = sum(sizes[width] for width in used)
    assert np.shape(bits) == (2, 4) and spent <= budget and set(used) <= set(sizes)
    if method not in ("uniform", "bsp"):
        _, most = allocation.feasible_range(4, list(sizes), list(sizes.values()), rule.get("keep", []))
        assert budget - spent < 10 or spent == 2 * most


def test_widths_that_were_not_measured():
    with pytest.raises(ValueError, match=r"allocation\.widths=\[1, 2, 3, 4\]: no errors were measured at \[1, 4\]; add them"):
        allocation.allocate(chosen("pmq"), 2, 4, SIZES, 200, statistics_of(0, widths=[2, 3]))
    allocation.allocate(chosen("frequency"), 2, 4, SIZES, 200, statistics_of(0, widths=[2, 3]))  # measures none


def test_important_experts_get_more_bits():
    statistics = statistics_of(0, layers=1)
    statistics["layers"][0] |= {"frequency": [0.9, 0.5, 0.3, 0.3], "weight": [0.5, 0.3, 0.1, 0.1]}
    statistics["layers"][0]["errors"] = [[8.0, 4.0, 2.0, 1.0]] * 4
    for method in ("pmq", "frequency", "weight"):
        ((bits,), _) = allocation.allocate(chosen(method), 1, 4, {w: w for w in WIDTHS}, 10, statistics)
        assert bits == sorted(bits, reverse=True) and sum(bits) == 10


def test_cost_is_the_papers():
    cost = allocation.pmq_cost([1.0, 3.0], [0.2, 0.6], [[2.0, 1.0], [4.0, 3.0]], 1.0, 2.0, 2.0)
    assert np.allclose(cost, [[0.25 * 0.25**2 * 4, 0.25 * 0.25**2], [0.75 * 0.75**2 * 16, 0.75 * 0.75**2 * 9]])


@given(
    st.floats(0, 1),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([[1, 2, 3, 4], [13, 23, 33, 43], [5, 5], [13, 33, 43], [43, 13, 33], [2, 4]]),
)
def test_shares_add_up(part, layers, experts, sizes):
    low, high = layers * experts * min(sizes), layers * experts * max(sizes)
    total = low + part * (high - low)
    found = allocation.shares(total, layers, experts, sizes)
    step = math.gcd(*(size - min(sizes) for size in sizes)) or 1
    assert total - step < sum(found) <= total + 1e-6 and max(found) - min(found) <= step
    assert min(found) >= experts * min(sizes) and all(share % step == found[0] % step for share in found)


@given(st.floats(1, 8), st.integers(1, 30))
def test_mixed_is_sorted_and_fills_the_total(average, experts):
    widths, total = [1, 2, 3, 4, 8], average * experts
    found = mixed({w: w for w in widths}, total, experts)
    wider = next((w for w in widths if w > min(found)), None)
    assert len(found) == experts and found == sorted(found, reverse=True) and len(set(found)) <= 2
    assert sum(found) <= total + 1e-6 and (wider is None or total - sum(found) < wider - min(found) + 1e-6)
    narrow = mixed({w: w for w in widths}, total, experts, mixes=False)
    assert set(narrow) == {max(w for w in widths if w * experts <= total + 1e-9)}


def test_every_rule_through_its_stages(model_folder, text_folder, tmp_path):
    """From the command's overrides to allocation.json, by average and by bytes: predicted within the budget."""
    small = [*small_experiment(model_folder, text_folder), "device=cpu", "quantization=rtn", f"paths.results={tmp_path}"]
    for method in METHODS:
        for size in ("bits=3" if method == "uniform" else "bits=2.5", "budget=0.2MiB"):
            resolved = config.resolve([*small, f"allocation={method}", f"allocation.{size}", "gradients.num_sequences=2"])
            wanted = dag.artefact("allocation", resolved)
            needed = artefacts.write_tasks([wanted], dict.fromkeys(dag.everything([wanted]), resolved), tmp_path)
            for folder in needed:
                artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
            found = artefacts.read_json(tmp_path / wanted.folder / "allocation.json")
            assert np.shape(found["bits"]) == (2, 4), "layers, experts"
            if size.startswith("budget"):
                assert found["predicted_folder_bytes"] <= 0.2 * 2**20
            else:
                assert found["mean_bits"] == (3 if method == "uniform" else 2.5)
    (gradients,) = tmp_path.glob("gradients/*")
    summary = artefacts.read_json(gradients / "gradients.json")
    assert summary["sequences"] == [0, 4] and [layer["layer"] for layer in summary["layers"]] == [0, 1]
    assert {path.name for path in gradients.glob("*.safetensors")} == {"layer-000.safetensors", "layer-001.safetensors"}
    read = [artefacts.read_json(path / "statistics.json") for path in tmp_path.glob("statistics/*")]
    assert len(read) == 3, "plain; by rounding between extremes; with gradients"
    assert sum("loss_errors" in found["layers"][0] for found in read) == 1
    assert len({str([layer["frequency"] for layer in found["layers"]]) for found in read}) == 1
