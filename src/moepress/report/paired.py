"""Differences between runs that answered the same: over the same blocks of text, over the same items of a task.

What two runs have in common (some texts are harder than others, some calibration samples are luckier) cancels in the
difference of each pair, so these are much surer than the difference of two means with their own errors suggests. The intervals
are Student's, with Welch and Satterthwaite's degrees of freedom: with three seeds they hold the truth in 93 to 96 of a hundred.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moepress.report.reading import methods, reference_of
from moepress.report.run import Run

CONFIDENCE = 0.95
SIXTEEN = "16 bits"

BASELINES: dict = {
    "quantization": {"best": "fast", "fast": "qesc", "qesc": "gptq", "gptq": "rtn"},
    "allocation": ("uniform", "half"),
    "pruning": ("none",),
}
"""What each method builds on: of a quantization method another one, of an allocation or a pruning the plain ones. Between two
widths no allocation is plainer than `half`, which itself builds on `uniform`."""

RECIPES = ("fast", "best")
"""Of many settings together (conf/experiment/), compared as a whole: only what decides the size has to be the same."""
SIZES = {"group_size", "attention_bits", "shared_bits"}


class Difference(NamedTuple):
    """A mean of paired differences, its standard error, and the degrees of freedom of that; nan where unknown."""

    value: float
    stderr: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The confidence interval; of no width for runs that are the same, nan where the noise is unknown."""
        reach = 0.0 if self.stderr == 0 else stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom) * self.stderr
        return self.value - reach, self.value + reach

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds zero, or is unknown."""
        low, high = self.interval
        return not (low > 0 or high < 0)


NOTHING = Difference(np.nan, np.nan, np.nan)


def difference(runs: list[Run], others: list[Run], measured: Callable[[Run], dict[str, np.ndarray]]) -> Difference:
    """Mean of what was measured of `runs` above that of `others`, pair by pair; every stratum counts alike.

    Each list holds one configuration under one or more seeds, which are averaged. measured: a run's values by stratum (a
    domain, a task), the same places in the same order for every run. The variance is that of the mean over the pairs, stratum
    by stratum, and over the seeds: of the differences, seed by seed, where both sides have the same ones, else of each side's
    mean. NOTHING without anything measured.
    """
    sides = [[measured(run) for run in side] for side in (runs, others)]
    strata = list(sides[0][0])
    if not strata:
        return NOTHING
    own, base = ({name: np.mean([each[name] for each in side], axis=0) for name in strata} for side in sides)
    above = [own[name] - base[name] for name in strata]
    parts = [(np.var(each, ddof=1) / len(each) if len(each) > 1 else np.nan, len(each) - 1) for each in above]
    parts = [(variance / len(strata) ** 2, freedom) for variance, freedom in parts]
    by_seed = [
        {run.seed: np.mean([each[name].mean() for name in strata]) for run, each in zip(side, values, strict=True)}
        for side, values in zip((runs, others), sides, strict=True)
    ]
    if by_seed[0].keys() == by_seed[1].keys():
        drawn = [[by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]]]
    else:
        drawn = [list(means.values()) for means in by_seed]
    parts += [(np.var(means, ddof=1) / len(means), len(means) - 1) for means in drawn if len(means) > 1]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / count for part, count in parts) if variance > 0 else np.nan
    return Difference(float(np.mean([each.mean() for each in above])), float(np.sqrt(variance)), float(freedom))


def nll(domains: list[str]) -> Callable[[Run], dict[str, np.ndarray]]:
    """Nats per token of each block of these domains."""
    return lambda run: {domain: run.nll[domain] for domain in domains}


def scores(tasks: list[str]) -> Callable[[Run], dict[str, np.ndarray]]:
    """The score of each item of these tasks."""
    return lambda run: {task: run.item_scores[task] for task in tasks}


def increase(runs: list[Run], others: list[Run], domains: list[str]) -> Difference:
    """Mean nll of `runs` above that of `others`, in nats per token."""
    return difference(runs, others, nll(domains))


def accurate(runs: list[Run]) -> list[str]:
    """Tasks scored by an accuracy that all of the runs answered."""
    common = [set(run.task_scores) for run in runs]
    return [
        task
        for task, score in runs[0].task_scores.items()
        if score["metric"].startswith("acc") and all(task in own for own in common)
    ]


@dataclass(frozen=True)
class Pair:
    """One method under one or more seeds, and what it is compared with. step: what differs: `quantization`, `allocation`,
    `pruning`; or `SIXTEEN`."""

    runs: list[Run]
    others: list[Run]
    step: str

    @property
    def against(self) -> str:
        return self.others[0].series

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """By metric: `nll` and `nll_ood` (nats per token, less is better), `acc` and `acc_<task>` (shares, more is better)."""
        inside, outside = self.runs[0].domains
        tasks = accurate(self.runs + self.others)
        found = {"nll": increase(self.runs, self.others, inside), "nll_ood": increase(self.runs, self.others, outside)}
        found["acc"] = difference(self.runs, self.others, scores(tasks)) if tasks else NOTHING
        return found | {f"acc_{task}": difference(self.runs, self.others, scores([task])) for task in tasks}


def pairs(runs: list[Run]) -> list[Pair]:
    """Each method against what it builds on, where that is among the runs, then each against the 16-bit model."""
    members, found = methods(run for run in runs if not run.is_reference), []
    for step in BASELINES:
        for own in members:
            for others in members:
                if is_step(own[0], others[0], step) and (sides := of_the_same_samples(own, others)):
                    found.append(Pair(*sides, step))
    return found + [Pair(own, [reference], SIXTEEN) for own in members if (reference := reference_of(own[0], runs))]


def of_the_same_samples(own: list[Run], others: list[Run]) -> tuple[list[Run], list[Run]] | None:
    """The runs of both under the seeds that both have; all of them where one side is a single run that nothing was drawn for,
    which stands for every seed. None where nothing is left."""
    if any(len(side) == 1 and not side[0].is_drawn for side in (own, others)):
        return own, others
    common = {run.seed for run in own} & {run.seed for run in others}
    left = [[run for run in side if run.seed in common] for side in (own, others)]
    return (left[0], left[1]) if common else None


def is_step(run: Run, other: Run, step: str) -> bool:
    """Whether `other` is what `run` builds on in this one configuration group, all else alike."""
    if run.target != other.target or any(
        run.artefacts.get(stage) != other.artefacts.get(stage) for stage in ("corpus", "model")
    ):
        return False
    if _settings(run, step) != _settings(other, step):
        return False
    own, base = getattr(run, step), getattr(other, step)
    if step == "quantization":
        builds_on = other.method == BASELINES[step].get(run.method)
    else:
        plain = BASELINES[step]
        builds_on = base["method"] in (plain[: plain.index(own["method"])] if own["method"] in plain else plain)
    same_rest = all(getattr(run, group) == getattr(other, group) for group in BASELINES if group != step)
    common = (set(own) & set(base)) - {"method", "widths", "name"}
    if own.get("name") in RECIPES:
        common &= SIZES
    return builds_on and same_rest and all(own[key] == base[key] for key in common)


def _settings(run: Run, step: str) -> set[str]:
    """What a run's name lists beside its methods, outside this group."""
    return {part for part in run.name.split(" ")[1:] if not part.startswith(("seed=", f"{step}."))}


def tabulate(found: list[Pair]) -> pd.DataFrame:
    """One row for each pair and metric; `low` and `high` bound the confidence interval."""
    rows = []
    for pair in found:
        about = {"method": pair.runs[0].series, "size": pair.runs[0].target, "against": pair.against, "step": pair.step}
        about |= {"runs": "; ".join(run.name for run in pair.runs), "other_runs": "; ".join(run.name for run in pair.others)}
        for metric, one in pair.differences.items():
            if not np.isnan(one.value):
                low, high = one.interval
                numbers = {"difference": one.value, "stderr": one.stderr, "freedom": one.freedom, "low": low, "high": high}
                rows.append({**about, "metric": metric, **numbers, "within_noise": one.is_noise})
    return pd.DataFrame(rows)
