"""How long the one program over all layers takes at the size of the largest models, and how far from its bound it ends:

python benchmarks/allocation.py [--layers 58] [--experts 256] [--average 2.5]

Costs are drawn: a layer's and an expert's importance log-normal, errors by width falling as a clipped grid's do, with noise.
The solver's own gap is checked against a bound that owes it nothing, Lagrange's: for any price p >= 0 of a bit,
`sum_i min_j (cost_ij + p size_j) - p budget` is below every allocation's cost.
"""

import argparse
import time
import types

import numpy as np
from scipy.optimize import minimize_scalar

from moepress import allocation
from moepress.models.families import Shape
from moepress.quantization.size import expert_bytes

WIDTHS = [1, 2, 3, 4]
RELATIVE = [0.363, 0.115, 0.033, 0.0095]
"""Squared error of Gaussian weights at each width."""


def drawn_costs(rng, layers: int, experts: int, spread: float) -> np.ndarray:
    importance = np.exp(rng.normal(0, spread, (layers, 1, 1)) + rng.normal(0, spread, (layers, experts, 1)))
    return importance * RELATIVE * np.exp(rng.normal(0, 0.2, (layers, experts, len(WIDTHS))))


def lagrange_bound(cost_NJ: np.ndarray, sizes: np.ndarray, budget: float) -> float:
    """The best of the bounds over all prices; concave in the price."""

    def below(log_price):
        price = np.exp(log_price)
        return -((cost_NJ + price * sizes).min(1).sum() - price * budget)

    highest = np.log(cost_NJ.max() / sizes.min())
    return -minimize_scalar(below, bounds=(highest - 60, highest), method="bounded", options={"xatol": 1e-9}).fun


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 58), ("experts", 256), ("average", 2.5), ("gap", 5e-5)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    arguments = parser.parse_args()
    L, E = arguments.layers, arguments.experts
    shape = types.SimpleNamespace(hidden_size=7168, intermediate_size=2048)
    assert {*vars(shape)} <= {*Shape.__dataclass_fields__}
    in_bytes = {width: expert_bytes(shape, width, 128) for width in WIDTHS}
    cases = [(unit, spread, keep) for unit in ("bits", "bytes") for spread in (0.5, 1.0, 2.0) for keep in ([], [3, 4])]
    print(f"{L} layers x {E} experts x {len(WIDTHS)} widths, {arguments.average:g} bits on average")
    print("unit   spread  keep    seconds   CPU  solver's gap  gap to Lagrange's bound  bits by layer")
    for unit, spread, keep in cases:
        cost = drawn_costs(np.random.default_rng(0), L, E, spread)
        sizes = in_bytes if unit == "bytes" else {width: width for width in WIDTHS}
        narrow, wide = sizes[2], sizes[3]
        total = L * E * (narrow + (arguments.average - 2) * (wide - narrow))
        settings = {"method": "global", "widths": WIDTHS, "keep": keep, "gap": arguments.gap}
        statistics = {"widths": WIDTHS, "layers": [{"loss_errors": layer} for layer in cost]}
        start, busy = time.perf_counter(), time.process_time()
        bits, (found,) = allocation.allocate(settings, L, E, sizes, total, statistics)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        bound = lagrange_bound(cost.reshape(L * E, -1), np.array([sizes[width] for width in WIDTHS]), total)
        means, above = np.mean(bits, axis=1), found.objective / bound - 1
        print(
            f"{unit:6} {spread:6g}  {keep!s:7} {seconds:7.2f} {busy:5.2f}  {found.gap:12.1e}  {above:23.1e}"
            f"  {means.min():.2f} to {means.max():.2f}",
            flush=True,
        )
