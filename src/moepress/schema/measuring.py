"""Keys of conf/evaluation/, conf/latency/ and conf/tracking/."""

import math
import re
from dataclasses import dataclass
from typing import Any

from moepress.schema.values import check, parse_bytes


@dataclass
class Evaluation:
    """tasks: a name or a list of names; moepress.evaluation.suites checks them."""

    seq_len: int
    num_blocks: int | None
    stride: int | None
    separator: str | None
    domains: list[str] | None
    batch_size: int
    tasks: Any
    source: str
    limit: int | None
    num_fewshot: int | None
    run_generated_code: bool
    divergence: bool
    decomposition: bool

    def __post_init__(self):
        self.tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
        ok = isinstance(self.tasks, list) and all(isinstance(name, str) for name in self.tasks)
        expected = "none, a suite (quick, paper, mmlu, generation), or a list of these and of lm-eval's names"
        check(ok, "evaluation.tasks", self.tasks, expected)
        self.tasks = [name for name in self.tasks if name != "none"]
        check(self.source in ("package", "hub"), "evaluation.source", self.source, "one of package, hub")
        check(self.limit is None or self.limit >= 1, "evaluation.limit", self.limit, "null for all items, or at least 1")
        ok = self.num_fewshot is None or self.num_fewshot >= 0
        check(ok, "evaluation.num_fewshot", self.num_fewshot, "null for each task's own, or a number that is not negative")
        check(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "at least 1")
        check(
            self.num_blocks is None or self.num_blocks >= 1,
            "evaluation.num_blocks",
            self.num_blocks,
            "null for all, or at least 1",
        )
        check(self.seq_len >= 8, "evaluation.seq_len", self.seq_len, "at least 8 tokens")
        expected = f"null, or between 1 and evaluation.seq_len={self.seq_len}"
        check(self.stride is None or 1 <= self.stride <= self.seq_len, "evaluation.stride", self.stride, expected)
        check(self.domains is None or self.domains, "evaluation.domains", self.domains, "null for all, or a list")


@dataclass
class Latency:
    """prefill_batch ... decode_len: whole numbers or lists of them. model: of conf/latency/models/; moepress.latency.shapes
    checks."""

    prefill_batch: Any
    prefill_len: Any
    decode_batch: Any
    decode_len: Any
    decode_tokens: int
    repeats: int
    cuda_graphs: bool
    buffer: str
    threads: int
    hardware: str
    model: str | None
    num_layers: int
    skew: float
    dtype: str

    def __post_init__(self):
        for name in ("prefill_batch", "prefill_len", "decode_batch", "decode_len"):
            given = getattr(self, name)
            values = given if isinstance(given, list) else [given]
            ok = values and all(type(value) is int and 1 <= value <= 2**20 for value in values)
            check(bool(ok), f"latency.{name}", given, f"a whole number between 1 and {2**20}, or a list of such: [4, 1]")
            setattr(self, name, list(dict.fromkeys(values)))
        for name in ("decode_tokens", "threads", "num_layers"):
            check(1 <= getattr(self, name) <= 2**20, f"latency.{name}", getattr(self, name), f"between 1 and {2**20}")
        check(0 <= self.repeats <= 2**20, "latency.repeats", self.repeats, "at least 1, or 0 for no timing")
        ok = parse_bytes(self.buffer, "latency.buffer") >= 1 << 20
        check(ok, "latency.buffer", self.buffer, "at least 1MiB; many times the caches, or they are measured")
        expected = "a Zipf exponent that is not negative (0: all experts alike)"
        check(math.isfinite(self.skew) and self.skew >= 0, "latency.skew", self.skew, expected)
        known = ("auto", "float32", "bfloat16", "float16")
        check(self.dtype in known, "latency.dtype", self.dtype, f"one of {', '.join(known)}")


MIRRORED = (
    *("corpus", "model", "calibration", "gradients", "statistics", "allocation", "quantization", "pruning", "evaluation"),
    *("divergence", "decomposition", "latency", "report"),
)
"""What is an artifact at W&B: `dag.STAGES` without the blocks of statistics, and the report. Written out, for that module knows
this one and not the other way round."""


@dataclass
class Tracking:
    mode: str
    project: str
    entity: str | None
    upload: list[str]

    def __post_init__(self):
        modes = ("disabled", "offline", "online")
        check(self.mode in modes, "tracking.mode", self.mode, "one of disabled, offline, online")
        is_name = re.fullmatch(r"[^/\\#?%:\s][^/\\#?%:]{0,127}", self.project)
        check(
            bool(is_name), "tracking.project", self.project, "a W&B project's name: up to 128 characters, none of / \\ # ? % :"
        )
        for stage in self.upload:
            check(stage in MIRRORED, "tracking.upload", stage, f"stages, of {', '.join(MIRRORED)}")
