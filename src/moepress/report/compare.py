"""Which method is best at each size, by how much, and whether that is more than noise."""

from dataclasses import dataclass

import numpy as np

from moepress.report import paired
from moepress.report.paired import Difference, increase
from moepress.report.reading import base_of, methods, reference_of
from moepress.report.run import Run, Speedup, label
from moepress.report.table import mean_over_domains
from moepress.wording import decimal, rounded_bytes


@dataclass(frozen=True)
class Place:
    """One series of runs at one size, with differences of nll in nats per token.

    delta, out_delta: above the 16-bit model, in and out of domain. gap, out_gap: above the one that is best in domain.
    """

    series: str
    runs: list[Run]
    is_best: bool
    delta: Difference
    gap: Difference
    out_delta: Difference
    out_gap: Difference

    @property
    def is_tied(self) -> bool:
        """Not to be told from the best: within noise, or noise unknown."""
        return not self.is_best and self.gap.is_noise


SAME_SIZE = 0.01
"""Share by which the bytes of checkpoints may differ that are ranked together."""


def places(runs: list[Run]) -> dict[str, list[Place]]:
    """Size -> its series, best first. A size is the one asked for, and where the checkpoints' bytes differ within it, each of
    them: `'3 bits, 1.87 MiB'`. Without pruned runs: pruning trades speed, not size."""
    measured = [run for run in runs if run.is_quantized and not run.is_pruned]
    measured.sort(key=lambda run: -run.width)
    found = {}
    for target in dict.fromkeys(run.target for run in measured):
        sizes = by_size([run for run in measured if run.target == target])
        for members in sizes:
            title = target if len(sizes) == 1 else f"{target}, {rounded_bytes(max(run.checkpoint_bytes for run in members))}"
            found[title] = ranked(members, runs)
    return found


def by_size(runs: list[Run]) -> list[list[Run]]:
    """Methods whose checkpoints take the same bytes, but for SAME_SIZE of the largest, together; the largest first."""
    found: list[list[Run]] = []
    sizes = [(max(run.checkpoint_bytes for run in own), own) for own in methods(runs)]
    largest = np.inf
    for size, own in sorted(sizes, key=lambda pair: -pair[0]):
        if not found or size < (1 - SAME_SIZE) * largest:
            found.append([])
            largest = size
        found[-1] += own
    return found


def ranked(members: list[Run], runs: list[Run]) -> list[Place]:
    """Runs of one size by series, the smallest nll first."""
    groups: dict[str, list[Run]] = {}
    for run in members:
        groups.setdefault(run.series, []).append(run)
    inside, outside = members[0].domains
    nll = {name: np.mean([mean_over_domains(run.blocks, inside)[0] for run in group]) for name, group in groups.items()}
    order = sorted(groups, key=nll.__getitem__)
    best = groups[order[0]]
    found = []
    for name in order:
        group, reference = groups[name], reference_of(groups[name][0], runs)
        differences = []
        for domains in (inside, outside):
            differences.append(increase(group, [reference], domains) if reference else paired.NOTHING)
            differences.append(Difference(0.0, 0.0, np.nan) if group is best else increase(group, best, domains))
        found.append(Place(name, group, group is best, *differences))
    return found


def marks(runs: list[Run]) -> dict[str, str]:
    """Run's name -> 'best', 'tied' (within noise of the best) or ''; a size with a single series has none."""
    found = dict.fromkeys((run.name for run in runs), "")
    for ranking in places(runs).values():
        for place in ranking if len(ranking) > 1 else []:
            found.update({run.name: "best" if place.is_best else "tied" if place.is_tied else "" for run in place.runs})
    return found


def percent(delta: Difference, sign: bool = True) -> str:
    """A difference of nll (nats) and its error as the change of perplexity: `+1.2 % ± 0.3`."""
    ratio = np.exp(delta.value)
    error = 100 * ratio * delta.stderr
    value = f"{decimal(100 * (ratio - 1), digits(error), sign)}\u00a0%"
    return value if np.isnan(error) else f"{value} ±\u00a0{error:.{digits(error)}f}"


def digits(error: float) -> int:
    """Digits behind the point of a percentage with this standard error: 1 to 3."""
    return int(np.clip(-np.floor(np.log10(error)), 1, 3)) if error > 0 else 1


def summary(runs: list[Run]) -> list[str]:
    """Sentences on what the runs show, computed from them."""
    sentences = [_sixteen_bit(run) for run in runs if run.is_reference]
    rankings = list(places(runs).values())
    sentences += [_size(ranking, runs) for ranking in rankings]
    sentences += _unequal(rankings)
    sentences += _paired(runs)
    sentences += _shifts(runs)
    sentences += _pruned(runs)
    sentences += _speed(runs)
    return sentences


def _sixteen_bit(run: Run) -> str:
    inside, outside = run.domains
    where = f"over {len(inside)} domains" if len(inside) > 1 else f"on {inside[0]}"
    which = f" ({' '.join(run.extras)})" if run.extras else ""
    text = f"At 16 bits the model{which} takes {rounded_bytes(run.checkpoint_bytes)} and has a perplexity of "
    text += f"{np.exp(mean_over_domains(run.blocks, inside)[0]):.4g} {where}"
    if outside:
        text += f" and of {np.exp(mean_over_domains(run.blocks, outside)[0]):.4g} on text from elsewhere"
        text += f" ({', '.join(outside)})"
    return text + "."


def _size(ranking: list[Place], runs: list[Run]) -> str:
    best = ranking[0]
    smaller = ""
    if reference := reference_of(best.runs[0], runs):
        smaller = f", {reference.checkpoint_bytes / best.runs[0].checkpoint_bytes:.1f}× smaller"
    cost = percent(best.delta)
    if best.runs[0].domains[1]:
        cost += f" ({percent(best.out_delta)} out of domain)"
    text = f"At {best.runs[0].target} ({rounded_bytes(best.runs[0].checkpoint_bytes)}{smaller}) "
    tied, behind = ([place for place in ranking[1:] if place.is_tied == is_tied] for is_tied in (True, False))
    if len(ranking) == 1:
        return f"{text}{best.series} changes perplexity by {cost}."
    if tied:
        names = " and ".join(filter(None, [", ".join(place.series for place in tied[:-1]), tied[-1].series]))
        noise = "too few blocks to know the noise" if np.isnan(tied[0].gap.stderr) else f"within {_noise(best, *tied)}"
        text += f"{best.series} has the lowest perplexity, {cost}, but is not to be told from {names}: {noise}"
    else:
        text += f"{best.series} is best, perplexity {cost}"
    if behind:
        gap = percent(behind[0].gap, sign=False)
        text += f"; {behind[0].series} is behind by {gap}, more than {_noise(best, behind[0])}"
    outside = [place for place in ranking[1:] if place.out_gap.value < 0 and not place.out_gap.is_noise]
    if outside:
        ahead = min(outside, key=lambda place: place.out_gap.value)
        gap = percent(ahead.out_gap._replace(value=-ahead.out_gap.value), sign=False)
        text += f"; out of domain {ahead.series} is ahead of it by {gap}"
    return text + "."


def _noise(*compared: Place) -> str:
    """What the errors of their differences hold."""
    samples = " and of the calibration samples" if any(len(place.runs) > 1 for place in compared) else ""
    return f"the noise of the test text{samples}"


def _unequal(rankings: list[list[Place]]) -> list[str]:
    """What asked for one size and came out at several."""
    sizes: dict[str, list[str]] = {}
    for ranking in rankings:
        run = ranking[0].runs[0]
        sizes.setdefault(run.target, []).append(rounded_bytes(run.checkpoint_bytes))
    return [
        f"At {target} the checkpoints take {', '.join(own[:-1])} and {own[-1]}: methods are ranked within one of these sizes."
        for target, own in sizes.items()
        if len(own) > 1
    ]


def _shifts(runs: list[Run]) -> list[str]:
    """QESC's purpose: fewer changed selections than GPTQ's with the same widths."""
    pairs = []
    for run in runs:
        if run.method != "qesc" or run.is_pruned:
            continue
        twin = run.series.replace("QESC", "GPTQ", 1)
        other = [r for r in runs if r.series == twin and r.target == run.target and r.seed == run.seed]
        pairs += [(run, other[0])] if other else []
    if not pairs:
        return []
    lower = sum(q.metrics["selection_shift"] < g.metrics["selection_shift"] for q, g in pairs)
    shifts = [np.mean([100 * pair[side].metrics["selection_shift"] for pair in pairs]) for side in (0, 1)]
    return [
        f"Calibrating the router lowers the share of changed expert selections in {lower} of {len(pairs)} comparisons "
        f"with GPTQ: on average {shifts[0]:.1f} % of the slots change with QESC, {shifts[1]:.1f} % with GPTQ."
    ]


def _paired(runs: list[Run]) -> list[str]:
    """How many steps from one method to the next are more than noise."""
    steps = [pair for pair in paired.pairs(runs) if pair.step != paired.SIXTEEN]
    if not steps:
        return []
    names = dict.fromkeys(_named(p) for p in steps)
    parts = []
    for metric, name, better in (("nll", "perplexity", -1), ("acc", "accuracy", 1)):
        known = [one for pair in steps if not np.isnan((one := pair.differences[metric]).value)]
        gains = [better * one.value > 0 for one in known if not one.is_noise]
        if known:
            counts = f"{sum(gains)} better, {len(gains) - sum(gains)} worse, {len(known) - len(gains)} within noise"
            parts.append(f"{name}: {counts}")
    return [
        f"{len(steps)} paired comparisons of a method with what it builds on ({', '.join(names)}), each with a 95 % interval, "
        f"of which one in twenty misses by chance. {'; '.join(parts).capitalize()}."
    ]


def _named(pair: paired.Pair) -> str:
    """`GPTQ for RTN`, `PMQ for uniform`, `PESF for none`."""
    sides = (pair.runs[0], pair.others[0])
    own, base = (run.method if pair.step == "quantization" else getattr(run, pair.step)["method"] for run in sides)
    return f"{label(own)} for {base if base == 'none' else label(base)}"


def _pruned(runs: list[Run]) -> list[str]:
    found = []
    for group in methods(run for run in runs if run.is_pruned):
        run = group[0]
        bases = {base.name: base for member in group if (base := base_of(member, runs))}
        if same := list(bases.values()):
            cost = percent(increase(group, same, run.domains[0]))
            active = run.shape.top_k * np.mean([member.metrics["active_slots"] for member in group])
            what = f"computes {active:.2f} of {run.shape.top_k} experts per token for {cost} in perplexity"
            if run.remaining_experts < run.shape.num_experts:  # tokens choose among the rest
                what = f"keeps {run.remaining_experts} of {run.shape.num_experts} experts, of which it {what}"
            found.append(f"{run.pruning_label} on {same[0].title} {what}.")
    return found


def _speed(runs: list[Run]) -> list[str]:
    """By device the slowest and the fastest, with the quotients of their times' quartiles."""
    timed = [run for run in runs if run.speedup("decode")]  # none where the 16-bit model did not fit in memory
    found = []
    for device in dict.fromkeys(run.latency["device"] for run in timed):
        own = [run for run in timed if run.latency["device"] == device]
        speeds = {phase: [speed for run in own if (speed := run.speedup(phase))] for phase in ("prefill", "decode")}
        parts = [f"{phase} {_range(ratios)}" for phase, ratios in speeds.items()]
        found.append(f"Speed against 16 bits on {device} (in brackets quartile against quartile): {', '.join(parts)}.")
    return found


def _range(speedups: list[Speedup]) -> str:
    """`1.36× (0.62 to 2.94, within noise)`, `between 1.10× (1.05 to 1.20) and 1.36× (0.62 to 2.94), 1 of 5 within noise`."""
    ends = [f"{one.value:.2f}× ({one.low:.2f} to {one.high:.2f})" for one in (min(speedups), max(speedups))]
    noisy = sum(one.is_noise for one in speedups)
    if len(speedups) == 1 or ends[0] == ends[1]:
        return f"{ends[0][:-1]}, within noise)" if noisy else ends[0]
    count = "all" if noisy == len(speedups) else f"{noisy} of {len(speedups)}"
    return f"between {ends[0]} and {ends[1]}" + (f", {count} within noise" if noisy else "")
