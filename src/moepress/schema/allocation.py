"""Keys of conf/allocation/."""

from dataclasses import dataclass

from moepress.schema.values import WIDTHS, check, check_seed, parse_bytes


def spelled(budget: str) -> str:
    """A size without spaces, so that `1.4 GiB` and `1.4GiB` are one artefact; ValueError for what is no size."""
    parse_bytes(budget)
    return "".join(budget.split())


@dataclass
class Uniform:
    method: str
    bits: float
    budget: str | None

    def __post_init__(self):
        if self.budget is None:
            others = "for an average between two widths take allocation=pmq or another"
            check(self.bits in WIDTHS, "allocation.bits", self.bits, f"uniform takes one of {list(WIDTHS)}; {others}")
        else:
            self.budget = spelled(self.budget)


@dataclass
class Mixed:
    """What every allocation of several widths has."""

    method: str
    bits: float
    budget: str | None
    widths: list[int]

    def __post_init__(self):
        ok = bool(self.widths) and len(set(self.widths)) == len(self.widths) and set(self.widths) <= set(WIDTHS)
        check(ok, "allocation.widths", self.widths, f"a list of widths out of {list(WIDTHS)}")
        if self.budget is None:
            low, high = min(self.widths), max(self.widths)
            expected = f"between {low} and {high}, as allocation.widths={self.widths} has it"
            check(low <= self.bits <= high, "allocation.bits", self.bits, expected)
        else:
            self.budget = spelled(self.budget)


@dataclass
class Kept(Mixed):
    """Allocations that can be told to keep, in every layer, at least one expert at each width of `keep`."""

    keep: list[int]

    def __post_init__(self):
        super().__post_init__()
        ok = len(set(self.keep)) == len(self.keep) and set(self.keep) <= set(self.widths)
        check(ok, "allocation.keep", self.keep, f"a part of widths={self.widths}")


@dataclass
class RandomWidths(Kept):
    seed: int

    def __post_init__(self):
        super().__post_init__()
        check_seed("allocation.seed", self.seed)


@dataclass
class PMQ(Kept):
    frequency_exponent: float
    weight_exponent: float
    error_exponent: float
    weights: str
    errors: str

    def __post_init__(self):
        super().__post_init__()
        for name in ("frequency_exponent", "weight_exponent", "error_exponent"):
            value = getattr(self, name)
            check(0 <= value <= 16, f"allocation.{name}", value, "between 0 and 16")
        check(
            self.weights in ("renormalized", "softmax"),
            "allocation.weights",
            self.weights,
            "renormalized or softmax",
        )
        kinds = ("quantizer", "minmax", "nominal")
        check(self.errors in kinds, "allocation.errors", self.errors, f"one of {', '.join(kinds)}")


@dataclass
class Global(Kept):
    gap: float

    def __post_init__(self):
        super().__post_init__()
        check(0 <= self.gap < 1, "allocation.gap", self.gap, "at least 0 and below 1, such as 5e-5")


def reads_statistics(allocation: dict) -> bool:
    """Whether an allocation (as in conf/allocation/) depends on what experts do on the calibration text."""
    return allocation["method"] not in ("uniform", "half", "random")


def reads_errors(allocation: dict) -> bool:
    """Whether it depends on errors that are measured there at each of its widths."""
    return reads_statistics(allocation) and allocation.get("errors") != "nominal"


def reads_gradients(allocation: dict) -> bool:
    """Whether it depends on the gradient of the loss there."""
    return allocation["method"] == "global"
