"""Keys of conf/pruning/."""

import math
from dataclasses import dataclass

from moepress.schema.values import check


def is_fitted(method: str) -> bool:
    """Whether `pruning/fitting.py` fits it to the model and calibration text: PESF's threshold follows each sequence."""
    return method in ("odp", "ees", "static")


@dataclass
class NoPruning:
    method: str


@dataclass
class PESF:
    method: str
    alpha: float
    renormalize: bool

    def __post_init__(self):
        ok = math.isfinite(self.alpha) and self.alpha >= 0
        check(ok, "pruning.alpha", self.alpha, "a number that is not negative (the paper: 0.3 and 0.7)")


@dataclass
class EES:
    method: str
    quantile: float
    threshold: float | None
    renormalize: bool

    def __post_init__(self):
        check(0 <= self.quantile <= 1, "pruning.quantile", self.quantile, "between 0 and 1 (0.5: the median)")
        ok = self.threshold is None or 0 <= self.threshold <= 1
        check(ok, "pruning.threshold", self.threshold, "null for a quantile of each layer, or a ratio between 0 and 1")


@dataclass
class ODP(EES):
    protect: float

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.protect <= 1, "pruning.protect", self.protect, "a share between 0 and 1 (the paper: 0.02)")


@dataclass
class Static:
    method: str
    criterion: str
    ratio: float

    def __post_init__(self):
        check(self.criterion in ("reap", "frequency"), "pruning.criterion", self.criterion, "one of reap, frequency")
        check(0 <= self.ratio < 1, "pruning.ratio", self.ratio, "a share from 0 to below 1")
