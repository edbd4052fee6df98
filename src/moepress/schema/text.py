"""Keys of conf/corpus/, conf/calibration/, conf/gradients/ and conf/statistics/."""

from dataclasses import dataclass

from moepress.schema.values import WIDTHS, check, check_seed


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
