"""Paired differences against loops, intervals against simulation, and which methods are compared."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.report import paired
from moepress.report.paired import Difference


def compared(sides: list[list[dict[str, list[float]]]], is_shared: bool = False) -> Difference:
    """`difference` of two lists of measured values, one for each seed. is_shared: whether both sides have the same seeds."""
    runs = [
        [
            SimpleNamespace(
                seed=number + 10 * side * (not is_shared), values={name: np.asarray(own) for name, own in each.items()}
            )
            for number, each in enumerate(values)
        ]
        for side, values in enumerate(sides)
    ]
    return paired.difference(*runs, measured=lambda run: run.values)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_against_loops(seed, num_own, num_base, is_shared):
    rng = np.random.default_rng(seed)
    sizes = {name: int(rng.integers(2, 6)) for name in "abc"[: rng.integers(1, 4)]}
    own, base = ([{name: rng.normal(size=size) for name, size in sizes.items()} for _ in range(n)] for n in (num_own, num_base))
    found = compared([own, base], is_shared)
    means, parts = [], []
    for name, size in sizes.items():
        each = [np.mean([run[name][i] for run in own]) - np.mean([run[name][i] for run in base]) for i in range(size)]
        means.append(np.mean(each))
        parts.append((sum((x - means[-1]) ** 2 for x in each) / (size - 1) / size / len(sizes) ** 2, size - 1))
    overall = [[np.mean([run[name].mean() for name in sizes]) for run in side] for side in (own, base)]
    if is_shared and num_own == num_base:
        overall = [[one - other for one, other in zip(*overall, strict=True)]]
    for drawn in overall:
        if len(drawn) > 1:
            parts.append((np.var(drawn, ddof=1) / len(drawn), len(drawn) - 1))
    total = sum(variance for variance, _ in parts)
    assert found.value == pytest.approx(np.mean(means))
    assert found.stderr == pytest.approx(np.sqrt(total))
    assert found.freedom == pytest.approx(total**2 / sum(variance**2 / freedom for variance, freedom in parts))


@pytest.mark.parametrize(
    ("num_blocks", "num_seeds", "is_shared", "least"),
    [(4, 1, False, 0.93), (30, 1, False, 0.93), (30, 3, False, 0.93), (30, 3, True, 0.92)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(num_blocks, num_seeds, is_shared, least):
    """A thousand experiments with a true difference of 0.5; blocks are hard or easy for both sides alike, and so are shared
    calibration samples lucky or not."""
    rng = np.random.default_rng(0)
    held, widths = [], []
    for _ in range(1000):
        hard = {name: rng.normal(0, 5, num_blocks) for name in "ab"}
        drawn = rng.normal(0, 0.3 * (num_seeds > 1), (2, num_seeds)) + rng.normal(0, 2.0 * is_shared, num_seeds)
        sides = []
        for shift, side in zip((0.5, 0.0), drawn, strict=True):
            sides.append(
                [{name: own + shift + one + rng.normal(0, 0.4, num_blocks) for name, own in hard.items()} for one in side]
            )
        low, high = compared(sides, is_shared).interval
        held.append(low <= 0.5 <= high)
        widths.append(high - low)
    assert least <= np.mean(held) <= 0.985, np.mean(held)
    assert np.median(widths) < 2, "the samples' luck, 2 a sample, cancels"


def test_what_is_not_known_is_not_called_a_difference():
    alone = compared([[{"a": [1.0]}], [{"a": [0.5]}]])
    assert alone.value == 0.5 and np.isnan(alone.stderr) and alone.is_noise
    same = compared([[{"a": [1.0, 2.0]}]] * 2)
    assert same[:2] == (0, 0) and same.interval == (0, 0) and same.is_noise
    assert not compared([[{"a": [1.0, 2.0]}], [{"a": [0.5, 1.5]}]]).is_noise, "the same in every pair"
    assert Difference(0.1, 0.2, 9).is_noise and Difference(-0.1, 0.2, 9).is_noise
    assert not Difference(0.1, 0.02, 9).is_noise and not Difference(-0.1, 0.02, 9).is_noise
    empty = paired.difference([None], [None], lambda _: {})
    assert np.isnan(empty.value) and empty.is_noise


def run(quantization: dict, allocation: dict, pruning: dict | None = None, name: str = "run", seed: int = 0, target="2 bits"):
    pruning = pruning or {"method": "none"}
    method = quantization.get("name", quantization["method"])
    artefacts = {"model": "m", "corpus": "c"}
    series = " ".join([method, allocation["method"], str(pruning), *name.split(" ")[1:]])
    groups = {"quantization": quantization, "allocation": allocation, "pruning": pruning}
    own = {"method": method, "is_drawn": method != "rtn", "is_reference": False}
    return SimpleNamespace(**groups, **own, artefacts=artefacts, name=name, seed=seed, series=series, target=target)


RTN, GPTQ, QESC = (
    {"method": "rtn", "group_size": 8},
    {"method": "gptq", "group_size": 8, "damping": 0.1},
    {"method": "qesc", "group_size": 8, "damping": 0.1, "router_ridge": 1.0},
)
UNIFORM, PMQ = {"method": "uniform", "bits": 2}, {"method": "pmq", "bits": 2, "keep": [3]}
PESF = {"method": "pesf", "alpha": 0.3}


def steps(runs) -> list[tuple[int, int, str]]:
    found = [pair for pair in paired.pairs(runs) if pair.step != paired.SIXTEEN]
    return [(runs.index(pair.runs[0]), runs.index(pair.others[0]), pair.step) for pair in found]


def test_each_method_meets_what_it_builds_on():
    runs = [run(RTN, UNIFORM), run(GPTQ, UNIFORM), run(QESC, UNIFORM), run(QESC, PMQ), run(QESC, UNIFORM, PESF)]
    expected = [(1, 0, "quantization"), (2, 1, "quantization"), (3, 2, "allocation"), (4, 2, "pruning")]
    assert steps(runs) == expected
    assert steps([run(RTN, UNIFORM), run(QESC, UNIFORM)]) == [], "the step between is missing"


def test_between_two_widths_half_is_the_plain_allocation():
    half = {"method": "half", "bits": 2.5, "widths": [1, 2, 3, 4, 8]}
    pmq = {"method": "pmq", "bits": 2.5, "keep": [3], "widths": [1, 2, 3]}
    assert steps([run(GPTQ, half), run(GPTQ, pmq)]) == [(1, 0, "allocation")]
    same = {"bits": 2}
    runs = [run(GPTQ, UNIFORM), run(GPTQ, half | same), run(GPTQ, pmq | same)]
    assert steps(runs) == [(1, 0, "allocation"), (2, 0, "allocation"), (2, 1, "allocation")]


def test_a_recipe_of_many_settings_is_compared_as_a_whole():
    fast = QESC | {"name": "fast", "damping": 0.5, "refine_rounds": 2}
    runs = [run(QESC | {"name": "qesc"}, UNIFORM), run(fast, UNIFORM), run(fast | {"name": "best"}, UNIFORM)]
    assert steps(runs) == [(1, 0, "quantization"), (2, 1, "quantization")]
    assert steps([run(QESC | {"name": "qesc"}, UNIFORM), run(fast | {"group_size": 16}, UNIFORM)]) == []


def test_only_what_differs_in_one_thing_is_compared():
    assert steps([run(RTN, UNIFORM), run(GPTQ | {"group_size": 16}, UNIFORM)]) == []
    assert steps([run(RTN, UNIFORM), run(GPTQ, UNIFORM, target="3 bits")]) == []
    assert steps([run(RTN, UNIFORM), run(GPTQ, UNIFORM, PESF)]) == []
    assert steps([run(RTN, UNIFORM), run(GPTQ, UNIFORM, name="run calibration.seq_len=64")]) == []
    own = run(QESC, UNIFORM, name="run quantization.router_ridge=1.0")
    assert steps([run(GPTQ, UNIFORM), own]) == [(1, 0, "quantization")], "an override of the step itself"
    assert steps([run(GPTQ, UNIFORM), run(QESC, UNIFORM, seed=1)]) == []
    several = [run(method, UNIFORM, seed=seed) for method in (GPTQ, QESC) for seed in (0, 1)]
    (pair,) = [pair for pair in paired.pairs(several) if pair.step != paired.SIXTEEN]
    assert [one.seed for one in pair.runs] == [one.seed for one in pair.others] == [0, 1]
    for stage in ("model", "corpus"):
        other = run(QESC, UNIFORM)
        other.artefacts[stage] = "another"
        assert steps([run(GPTQ, UNIFORM), other]) == []


def test_common_samples_are_compared_and_what_draws_nothing_with_all():
    def seeds_of(pair):
        return [[one.seed for one in side] for side in (pair.runs, pair.others)]

    def under(method, seeds):
        return [run(method, UNIFORM, seed=seed) for seed in seeds]

    for own, base, expected in (
        ((0, 1), (1, 2), [[1], [1]]),
        ((0, 1, 2), (0, 1), [[0, 1], [0, 1]]),
        ((0,), (0, 1), [[0], [0]]),
    ):
        (pair,) = paired.pairs([*under(GPTQ, base), *under(QESC, own)])
        assert seeds_of(pair) == expected
    (pair,) = paired.pairs([*under(RTN, [0]), *under(GPTQ, (1, 2))])
    assert seeds_of(pair) == [[1, 2], [0]], "one run of RTN stands for all samples"


def test_the_table_tells_each_step_and_the_way_from_16_bits():
    reference = run({"method": "none"}, UNIFORM, target="16 bits")
    reference.is_reference = True
    runs = [reference, run(RTN, UNIFORM), run(GPTQ, UNIFORM)]
    for one, nll in zip(runs, ([1.0, 2.0], [1.5, 2.7], [1.3, 2.4]), strict=True):
        vars(one).update(domains=(["a"], []), nll={"a": np.asarray(nll)}, task_scores={})
    found = paired.tabulate(paired.pairs(runs))
    assert found["step"].tolist() == ["quantization", paired.SIXTEEN, paired.SIXTEEN]
    assert found["against"].tolist() == [runs[1].series, reference.series, reference.series]
    assert found["difference"].tolist() == pytest.approx([-0.25, 0.6, 0.35])
    assert found["metric"].tolist() == ["nll"] * 3, "what nobody measured is left out"
    for row, pair in zip(found.to_dict("records"), paired.pairs(runs), strict=True):
        one = pair.differences["nll"]
        assert (row["difference"], row["stderr"], row["freedom"]) == one
        assert (row["low"], row["high"]) == one.interval and row["within_noise"] == one.is_noise
