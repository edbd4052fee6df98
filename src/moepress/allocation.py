"""Bit widths for experts: PMQ's integer program (MC, arXiv 2410.06270), solved exactly by scipy's HiGHS.

For each MoE block, with x_ij = 1 where expert i takes width j:
    minimise    sum_ij phi_i^a * w_i^b * eps_ij^g * x_ij
    subject to  sum_j x_ij = 1,   sum_ij size_j x_ij <= budget,   sum_i x_ij >= 1 for j in keep.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from moepress.quantization.size import feasible_range


@dataclass
class Solution:
    """bits: a width for every expert. The certificate is the solver's: objective, lower bound, relative gap, seconds."""

    bits: list[int]
    objective: float
    bound: float
    gap: float
    seconds: float


def solve(cost_EJ: np.ndarray, widths: list[int], sizes: list[float], budget: float, keep: list[int] = ()) -> Solution:
    """The cheapest widths within a budget.

    cost: `[experts, widths]`. sizes: of an expert at each width, in the budget's unit. keep: widths that at least one expert
    takes. Raises ValueError, saying which budgets can be met, where none can.
    """
    E, J = cost_EJ.shape
    low, high = feasible_range(E, widths, sizes, keep)
    if budget < low - 1e-9:
        raise ValueError(f"no allocation fits {budget:g}: with keep={list(keep)} budgets from {low:g} to {high:g} can be met")
    one_each = np.kron(np.eye(E), np.ones(J))
    spent = np.tile(np.asarray(sizes, float), E)[None]
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent, -np.inf, budget + 1e-9)]
    for width in keep:
        chosen = np.tile([float(w == width) for w in widths], E)[None]
        constraints.append(LinearConstraint(chosen, 1, np.inf))
    scale = float(np.abs(cost_EJ).max()) or 1.0
    start = time.perf_counter()
    found = milp(
        cost_EJ.ravel() / scale,
        integrality=np.ones(E * J),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-9},
    )
    seconds = time.perf_counter() - start
    if found.x is None:
        raise ValueError(f"the solver found no allocation within {budget:g}: {found.message}")
    chosen = found.x.reshape(E, J).argmax(1)
    bits = [widths[j] for j in chosen]
    return Solution(bits, found.fun * scale, found.mip_dual_bound * scale, float(found.mip_gap), seconds)


def shares(total: float, num_layers: int, unit: float = 1.0) -> list[float]:
    """A total split over layers in whole units, as evenly as they allow: the running sum is never above its even share."""
    edges = [np.floor(total / unit * layer / num_layers + 1e-9) for layer in range(num_layers + 1)]
    return [unit * float(after - before) for before, after in pairwise(edges)]


def pmq_cost(frequency_E, weight_E, errors_EJ, a: float, b: float, g: float) -> np.ndarray:
    """`phi^a * w^b * eps^g`, `[E, J]`; phi and w are normalised within the layer."""
    phi = np.asarray(frequency_E) / max(np.sum(frequency_E), 1e-30)
    w = np.asarray(weight_E) / max(np.sum(weight_E), 1e-30)
    return (phi**a * w**b)[:, None] * np.asarray(errors_EJ) ** g


def pmq(statistics: list[dict], settings: dict, widths_measured: list[int], sizes: list[float], total: float) -> list[Solution]:
    """PMQ for every layer.

    statistics: a layer's `frequency`, `weight`, `softmax_weight` over experts and `errors [E, widths_measured]`.
    settings: as in conf/allocation/pmq.yaml. sizes: of one expert at each of settings["widths"]. total: the model's budget
    in the same unit; each layer gets an even share.
    """
    widths = settings["widths"]
    missing = sorted(set(widths) - set(widths_measured))
    if missing:
        raise ValueError(f"allocation.widths={widths}: no errors were measured at {missing}; add them to statistics.widths")
    columns = [widths_measured.index(w) for w in widths]
    weight = "weight" if settings["weights"] == "renormalized" else "softmax_weight"
    unit = np.gcd.reduce([int(size) for size in sizes])
    solutions = []
    for layer, budget in zip(statistics, shares(total, len(statistics), unit), strict=True):
        cost = pmq_cost(
            layer["frequency"],
            layer[weight],
            np.asarray(layer["errors"])[:, columns],
            settings["frequency_exponent"],
            settings["weight_exponent"],
            settings["error_exponent"],
        )
        solutions.append(solve(cost, widths, sizes, budget, settings["keep"]))
    return solutions
