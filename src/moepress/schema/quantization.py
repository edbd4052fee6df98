"""Keys of conf/quantization/."""

import math
from dataclasses import dataclass

from moepress.schema.values import WIDTHS, check


def quantizer_of_statistics(quantization: dict, allocation: dict) -> str:
    """What `statistics.quantizer=auto` stands for: the quantizer of the experts, or the one that the allocation names."""
    if allocation.get("errors") == "minmax":
        return "minmax"
    return "rtn" if quantization["method"] == "rtn" else "gptq"


@dataclass
class NoQuantization:
    """group_size is read by nothing: it lets one override serve quantized and 16-bit experiments alike."""

    method: str
    group_size: int

    def __post_init__(self):
        check(self.group_size >= 0, "quantization.group_size", self.group_size, "0: quantization=none has none")


@dataclass
class RTN:
    method: str
    name: str
    group_size: int
    attention_bits: int | None
    shared_bits: int | None
    clip_min: float
    clip_max: float
    clip_steps: int
    clip_ends: str
    clip_norm: float
    clip_weighted: bool
    fit_rounds: int
    zero_steps: int
    one_bit: str

    def __post_init__(self):
        ok = self.group_size >= 8 and self.group_size % 8 == 0
        check(ok, "quantization.group_size", self.group_size, "a multiple of 8, at least 8")
        for name in ("attention_bits", "shared_bits"):
            value = getattr(self, name)
            check(value is None or value in WIDTHS, f"quantization.{name}", value, f"null or one of {list(WIDTHS)}")
        check(0 < self.clip_min <= 1, "quantization.clip_min", self.clip_min, "above 0 and at most 1")
        check(1 <= self.clip_max <= 2, "quantization.clip_max", self.clip_max, "between 1 and 2")
        check(self.clip_ends in ("apart", "together"), "quantization.clip_ends", self.clip_ends, "apart or together")
        check(1 <= self.clip_norm <= 8, "quantization.clip_norm", self.clip_norm, "between 1 and 8")
        check(self.zero_steps in (1, 2, 4), "quantization.zero_steps", self.zero_steps, "1, 2 or 4: the format has quarters")
        check(self.one_bit in ("grid", "sign"), "quantization.one_bit", self.one_bit, "grid or sign")
        check(1 <= self.clip_steps <= 64, "quantization.clip_steps", self.clip_steps, "between 1 and 64")
        check(0 <= self.fit_rounds <= 100, "quantization.fit_rounds", self.fit_rounds, "between 0 and 100")


@dataclass
class GPTQ(RTN):
    damping: float
    block_size: int
    act_order: bool
    deferred_bits: int
    asymmetry: float
    refine_rounds: int
    tune_steps: int
    tune_tokens: int
    tune_rate: float
    tune_rest: bool
    tune_asymmetry: float
    distill_steps: int
    distill_rate: float
    distill_sequences: int | None

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.damping <= 1, "quantization.damping", self.damping, "above 0 and at most 1")
        check(self.block_size >= 1, "quantization.block_size", self.block_size, "at least 1")
        check(0 <= self.deferred_bits <= 8, "quantization.deferred_bits", self.deferred_bits, "between 0 and 8")
        for name in ("asymmetry", "tune_asymmetry"):
            check(0 <= getattr(self, name) <= 1, f"quantization.{name}", getattr(self, name), "between 0 and 1")
        check(0 <= self.refine_rounds <= 100, "quantization.refine_rounds", self.refine_rounds, "between 0 and 100")
        for name in ("tune_steps", "distill_steps"):
            check(getattr(self, name) >= 0, f"quantization.{name}", getattr(self, name), "0 for none, or more")
        wanted = self.distill_sequences
        check(
            wanted is None or wanted >= 1, "quantization.distill_sequences", wanted, "null for the calibration's, or at least 1"
        )
        check(self.tune_tokens >= 1, "quantization.tune_tokens", self.tune_tokens, "at least 1")
        expected = "above 0 and at most 0.1, of each scale in one step"
        for name in ("tune_rate", "distill_rate"):
            check(0 < getattr(self, name) <= 0.1, f"quantization.{name}", getattr(self, name), expected)


@dataclass
class QESC(GPTQ):
    router_loss: str
    router_when: str
    router_candidates: int | None
    router_ridge: float
    router_learning_rate: float
    router_steps: int
    router_batch: int

    def __post_init__(self):
        super().__post_init__()
        losses = ("none", "mse", "topk_mse", "topk_mse_gd", "kl")
        check(self.router_loss in losses, "quantization.router_loss", self.router_loss, f"one of {', '.join(losses)}")
        moments = ("before", "after", "both")
        expected = f"one of {', '.join(moments)} (the experts are quantized)"
        check(self.router_when in moments, "quantization.router_when", self.router_when, expected)
        found = self.router_candidates
        check(found is None or found >= 1, "quantization.router_candidates", found, "null, or at least 1")
        for name in ("router_ridge", "router_learning_rate"):
            value = getattr(self, name)
            check(math.isfinite(value) and value > 0, f"quantization.{name}", value, "a number above 0")
        for name in ("router_steps", "router_batch"):
            check(getattr(self, name) >= 1, f"quantization.{name}", getattr(self, name), "at least 1")
