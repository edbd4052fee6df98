"""Bit widths for experts, by every rule of `conf/allocation/`. The integer programs are solved by scipy's HiGHS.

With x_ij = 1 where expert i takes width j, within one MoE block (PMQ of MC, arXiv 2410.06270, and what is measured against
it) or over all blocks at once (`global`, as GEMQ, arXiv 2605.23078):
    minimise    sum_ij cost_ij x_ij
    subject to  sum_j x_ij = 1,   sum_ij size_j x_ij <= budget,   in each block sum_i x_ij >= 1 for j in keep.

Legend: L MoE layers, E experts of each, N = L * E, J widths, M matrices of an expert (gate and up as one, down).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from moepress.quantization.size import check_measured, feasible_range, mixed


@dataclass
class Solution:
    """bits: a width for every expert. The certificate is the solver's: objective, lower bound, relative gap."""

    bits: list[int]
    objective: float
    bound: float
    gap: float


def allocate(
    settings: dict, num_layers: int, num_experts: int, sizes: dict[int, int], total: float, statistics: dict | None = None
) -> tuple[list[list[int]], list[Solution]]:
    """A width for every expert of every MoE layer, `[L][E]`, and the certificates of the programs that were solved.

    settings: as in conf/allocation/. sizes: width -> size of one expert. total: what all of them may take, in the same unit.
    statistics: statistics.json, for the rules that read it. Raises ValueError naming what was not measured or cannot be met.
    """
    L, E, method = num_layers, num_experts, settings["method"]
    if method in ("uniform", "half"):
        return _by_layer(mixed(sizes, total, L * E, mixes=method == "half"), L), []
    widths, size_J, keep = settings["widths"], [sizes[width] for width in settings["widths"]], settings.get("keep", [])
    if method == "random":
        rng = np.random.default_rng(settings["seed"])
        return [random_widths(rng, E, widths, size_J, budget, keep) for budget in shares(total, L, E, size_J)], []
    assert statistics is not None  # the others read them
    if method == "bsp":
        found = solve(layer_costs(statistics, widths), widths, [E * size for size in size_J], total)
        return [[width] * E for width in found.bits], [found]
    costs_LEJ = expert_costs(settings, statistics)
    if method == "global":
        found = solve(costs_LEJ.reshape(L * E, -1), widths, size_J, total, keep, L, settings["gap"])
        return _by_layer(found.bits, L), [found]
    budgets = shares(total, L, E, size_J)
    solutions = [solve(cost_EJ, widths, size_J, budget, keep) for cost_EJ, budget in zip(costs_LEJ, budgets, strict=True)]
    return [solution.bits for solution in solutions], solutions


def _by_layer(bits: list[int], num_layers: int) -> list[list[int]]:
    return np.reshape(bits, (num_layers, -1)).tolist()


def solve(
    cost_NJ: np.ndarray,
    widths: list[int],
    sizes: list[int],
    budget: float,
    keep: Sequence[int] = (),
    num_layers: int = 1,
    gap: float = 1e-9,
) -> Solution:
    """The cheapest widths within a budget.

    cost: `[N, J]`, of N experts (of layers, where all of one take one width) at J widths, those of a layer side by side. sizes:
    of an expert at each width, whole numbers in the budget's unit. keep: widths that at least one expert of each layer takes.
    gap: relative, at which the solver may stop. Raises ValueError, saying which budgets can be met, where none can.
    """
    N, J = cost_NJ.shape
    low, high = (num_layers * bound for bound in feasible_range(N // num_layers, widths, sizes, keep))
    if budget < low - 1e-9:
        raise ValueError(f"no allocation fits {budget:g}: with keep={list(keep)} budgets from {low:g} to {high:g} can be met")
    # In steps above the smallest size, small whole numbers, no tolerance of the solver can exceed the budget.
    steps_J, unit = _steps(sizes)
    room = np.floor((budget - N * min(sizes)) / unit + 1e-9)
    constraints = [
        LinearConstraint(kron(eye_array(N), np.ones((1, J)), "csr"), 1, 1),
        LinearConstraint(csr_array(np.tile(steps_J, N)[None]), -np.inf, room),
    ]
    layers = kron(eye_array(num_layers), np.ones((1, N // num_layers)))
    for width in keep:
        chosen = kron(layers, np.equal(widths, width)[None].astype(float), "csr")
        constraints.append(LinearConstraint(chosen, 1, np.inf))
    scale = float(np.abs(cost_NJ).max()) or 1.0
    found = milp(
        cost_NJ.ravel() / scale,
        integrality=np.ones(N * J),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap},
    )
    if found.x is None:
        raise ValueError(f"the solver found no allocation within {budget:g}: {found.message}")
    chosen = found.x.reshape(N, J).argmax(1)
    assert steps_J[chosen].sum() <= room
    bits = [widths[j] for j in chosen]
    return Solution(bits, found.fun * scale, found.mip_dual_bound * scale, float(found.mip_gap))


def _steps(sizes: list[int]) -> tuple[np.ndarray, int]:
    """Sizes above the smallest in whole units, and the largest unit that allows it."""
    above = np.asarray(sizes, np.int64) - min(sizes)
    unit = int(np.gcd.reduce(above)) or 1
    return above // unit, unit


def shares(total: float, num_layers: int, num_experts: int, sizes: list[int]) -> list[float]:
    """A total split over layers, as evenly as whole steps from size to size allow: a running sum never above its even share."""
    unit, least = _steps(sizes)[1], num_experts * min(sizes)
    room = (total - num_layers * least) / unit
    edges = np.floor(room * np.arange(num_layers + 1) / num_layers + 1e-9)
    return [least + unit * float(steps) for steps in np.diff(edges)]


def random_widths(
    rng: np.random.Generator, num_experts: int, widths: list[int], sizes: list[int], budget: float, keep: list[int]
) -> list[int]:
    """Random widths that fill a budget: from the smallest that `keep` allows, experts drawn at random take the next width until
    none can. The last expert at a width of `keep` stays there."""
    order = np.argsort(sizes)
    by_size = [widths[j] for j in order]
    step_J = np.append(np.diff(np.asarray(sizes, float)[order]), np.inf)
    is_kept_J = np.isin(by_size, keep)
    at = np.array([by_size.index(width) for width in keep] + [0] * (num_experts - len(keep)))
    room = budget - np.asarray(sizes)[order][at].sum() + 1e-9
    rng.shuffle(at)
    while True:
        is_last_J = is_kept_J & (np.bincount(at, minlength=len(widths)) == 1)
        growing = np.flatnonzero(((step_J <= room) & ~is_last_J)[at])
        if not len(growing):
            return [by_size[i] for i in at]
        e = rng.choice(growing)
        room -= step_J[at[e]]
        at[e] += 1


def expert_costs(settings: dict, statistics: dict) -> np.ndarray:
    """What each expert costs at each width by the rule of `settings`, `[L, E, J]`."""
    layers, widths = statistics["layers"], settings["widths"]
    if settings["method"] == "global":
        return measured(statistics, "loss_errors", widths)
    if settings["method"] == "hessian":
        traces_LEM = np.array([layer["traces"] for layer in layers])
        return hessian_cost(traces_LEM[:, :, None], measured(statistics, "weight_errors", widths))
    weight = "weight" if settings["weights"] == "renormalized" else "softmax_weight"
    if settings["errors"] == "nominal":
        errors_LEJ = np.broadcast_to(2.0 ** -np.array(widths), (len(layers), len(layers[0]["frequency"]), len(widths)))
    else:
        errors_LEJ = measured(statistics, "errors", widths)
    exponents = [settings[f"{name}_exponent"] for name in ("frequency", "weight", "error")]
    given = zip(layers, errors_LEJ, strict=True)
    return np.array([pmq_cost(layer["frequency"], layer[weight], errors, *exponents) for layer, errors in given])


def layer_costs(statistics: dict, widths: list[int]) -> np.ndarray:
    """What each layer's output loses with all of its experts at each width, `[L, J]`."""
    return measured(statistics, "layer_errors", widths, axis=1)


def measured(statistics: dict, name: str, widths: list[int], axis: int = 2) -> np.ndarray:
    """A table of statistics.json over all layers, its columns (the widths that were measured) those of `widths`."""
    check_measured(widths, statistics["widths"])
    columns = [statistics["widths"].index(width) for width in widths]
    return np.take(np.array([layer[name] for layer in statistics["layers"]]), columns, axis)


def pmq_cost(frequency_E, weight_E, errors_EJ, a: float, b: float, g: float) -> np.ndarray:
    """`phi^a * w^b * eps^g`, `[E, J]`; phi and w are normalised within the layer."""
    phi = np.asarray(frequency_E) / max(np.sum(frequency_E), 1e-30)
    w = np.asarray(weight_E) / max(np.sum(weight_E), 1e-30)
    return (phi**a * w**b)[:, None] * np.asarray(errors_EJ) ** g


def hessian_cost(traces_M: np.ndarray, weight_errors_M: np.ndarray) -> np.ndarray:
    """`sum_m tr(H_m) / n_m * |W_m - Q(W_m)|^2` over an expert's matrices (HAWQ-V2, arXiv 1911.03852): a curvature's mean
    eigenvalue times the squared error of the weights."""
    return (traces_M * weight_errors_M).sum(-1)
