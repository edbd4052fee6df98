"""One run of a report and its artefacts, read once and only where asked for. Imports no torch."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from moepress import pruning
from moepress.artefacts import read_json
from moepress.lookup import StoredArtefact
from moepress.models import families, folders

LABELS = {"none": "16 bit", "pmq_code": "PMQ as coded", "hessian": "Hessian"}
LABELS |= {"gptq_minmax": "GPTQ min-max", "gptq_clip": "GPTQ wide clip", "gptq_mc": "GPTQ as MC codes it"}
LABELS |= {"fast": "ours, fast", "best": "ours, best", "static": "static removal"}
LABELS |= {name: name for name in ("uniform", "half", "random", "frequency", "weight", "global")}

UNTIMED = dict.fromkeys(("device", "threads", "dtype", "prefill_ms", "decode_ms", "speedup_prefill", "speedup_decode"))
UNTIMED |= {"prefill_ms_16bit": None, "decode_ms_16bit": None}
UNTIMED |= {"share_prefill": None, "share_decode": None, "versions": {}, "rows": [], "measured": None}
"""What latency.json would say of a run with latency.repeats=0."""

OWN_GROUP = re.compile(r"(quantization|allocation|calibration)\.(?!seed=|method=)(?=\w+=)")
"""Of an override whose key says enough without its group: none of these three has a key of another one's."""


def label(method: str) -> str:
    """A method as people write it."""
    return LABELS.get(method, method.upper().replace("_", " "))


class Speedup(NamedTuple):
    """How many times as fast as the 16-bit model that was timed in turn with it, and both medians in milliseconds.

    low: the 16-bit model's lower quartile over this one's upper quartile; high: its upper one over this one's lower.
    """

    value: float
    low: float
    high: float
    milliseconds: float
    milliseconds_16bit: float

    @property
    def is_noise(self) -> bool:
        """Whether the middle halves of both times overlap."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True)
class Run:
    """One row of the report. folders: stage -> its artefact's folder, keys: stage -> its key.

    quantization, allocation, pruning: the run's configuration groups.
    """

    name: str
    seed: int
    is_reference: bool
    quantization: dict
    allocation: dict
    pruning: dict
    artefacts: dict[str, str]
    results: Path

    def folder(self, stage: str) -> Path:
        return self.results / self.artefacts[stage]

    def json(self, stage: str, name: str):
        """One of the run's JSON files; ValueError naming it where it is missing."""
        path = self.folder(stage) / name
        if not path.is_file():
            raise ValueError(f"{path}: not there, but the report's run {self.name!r} needs it; run its stage {stage} again")
        return read_json(path)

    @property
    def keys(self) -> dict[str, str]:
        return {stage: folder.rpartition("-")[2] for stage, folder in self.artefacts.items()}

    @property
    def method(self) -> str:
        """Of the quantization, by its name in conf/quantization/: `best` is a qesc with other settings."""
        return self.quantization.get("name", self.quantization["method"])

    @property
    def is_quantized(self) -> bool:
        return self.quantization["method"] != "none"

    @property
    def is_pruned(self) -> bool:
        return self.pruning["method"] != "none"

    @property
    def is_mixed(self) -> bool:
        return self.is_quantized and len({width for layer in self.bits for width in layer}) > 1

    @property
    def target(self) -> str:
        """The size asked for: `'2.5 bits'`, `'12GiB'`, `'16 bits'`. Runs of one target are compared."""
        if not self.is_quantized:
            return "16 bits"
        return str(self.allocation["budget"]) if self.allocation.get("budget") else f"{self.allocation['bits']:g} bits"

    @property
    def width(self) -> float:
        """Bits asked for, or those on disk where bytes were asked for: for sorting."""
        if not self.is_quantized:
            return 16.0
        by_bytes = self.allocation.get("budget")
        return 8 * self.checkpoint_bytes / self.num_weights if by_bytes else float(self.allocation["bits"])

    @property
    def pruning_label(self) -> str:
        return pruning.label(self.pruning)

    @property
    def remaining_experts(self) -> int:
        """Routed experts of a layer that some token may select: fewer than the model's where some are removed for good."""
        if self.pruning["method"] != "static":
            return self.shape.num_experts
        return self.shape.num_experts - pruning.num_removed(self.pruning["ratio"], self.shape.num_experts, self.shape.top_k)

    @cached_property
    def is_drawn(self) -> bool:
        """Whether a calibration sample, or chance, had a part in it; without, one run stands for all seeds."""
        upstream: dict[str, StoredArtefact] = {}
        for folder in self.artefacts.values():
            StoredArtefact(self.results, folder).upstream(upstream)
        by_chance = self.is_quantized and "seed" in self.allocation
        return by_chance or any(item.stage == "calibration" for item in upstream.values())

    @property
    def unpruned(self) -> tuple[str, str]:
        """Of the run that this one prunes, or of itself: series and target."""
        return self.series.replace(f" + {self.pruning_label}", "") if self.is_pruned else self.series, self.target

    @property
    def extras(self) -> list[str]:
        """Overrides that the name lists, without the seed: `['group_size=64', 'gradients.num_sequences=4']`."""
        return [OWN_GROUP.sub("", part) for part in self.name.split(" ")[1:] if not part.startswith("seed=")]

    @property
    def series(self) -> str:
        """What stays the same along one line of a figure: the methods, and overrides that the name lists, but not the
        size and the seed."""
        allocation = self.allocation["method"] if self.is_quantized else "uniform"
        parts = [label(self.method)]
        parts += [label(allocation)] if allocation != "uniform" else []
        parts += [self.pruning_label] if self.is_pruned else []
        return " ".join([" + ".join(parts), *self.extras])

    @property
    def title(self) -> str:
        """Its series and size: what the runs of one configuration share."""
        return self.series if self.is_reference else f"{self.series}, {self.target}"

    @cached_property
    def metrics(self) -> dict:
        return self.json("evaluation", "metrics.json")

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """One row per evaluation block: domain, block, nll (nats per token), selection_shift (not at 16 bits)."""
        return pd.read_parquet(self.folder("evaluation") / "blocks.parquet")

    @cached_property
    def nll(self) -> dict[str, np.ndarray]:
        """Domain -> nats per token of each block."""
        return {domain: own.to_numpy() for domain, own in self.blocks.groupby("domain", sort=False)["nll"]}

    @cached_property
    def divergence(self) -> pd.DataFrame | None:
        """One row per evaluation block: domain, divergence from the 16-bit model (nats per token) and same_choice; None where
        evaluation.divergence was not asked for."""
        is_there = "divergence" in self.artefacts
        return pd.read_parquet(self.folder("divergence") / "blocks.parquet") if is_there else None

    @cached_property
    def decomposition(self) -> pd.DataFrame | None:
        """One row per evaluation block: domain, block and the nll 16bit, shift_only, weights_only and both; None where
        evaluation.decomposition was not asked for."""
        is_there = "decomposition" in self.artefacts
        return pd.read_parquet(self.folder("decomposition") / "blocks.parquet") if is_there else None

    @cached_property
    def overlap(self) -> dict[str, dict]:
        """Domain -> its perplexities, and by layer the top-k overlap with the 16-bit model, of a decomposed run."""
        return self.json("decomposition", "decomposition.json")["domains"]

    @cached_property
    def task_scores(self) -> dict[str, dict]:
        """Task -> its main score, as moepress.evaluation.harness gives it; none where no tasks were asked for."""
        path = self.folder("evaluation") / "tasks.json"
        return read_json(path)["moepress"]["scores"] if path.is_file() else {}

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row per item of the tasks; see moepress.evaluation.harness.Scored."""
        return pd.read_parquet(self.folder("evaluation") / "samples.parquet")

    @cached_property
    def item_scores(self) -> dict[str, np.ndarray]:
        """Task -> the score of each item."""
        return {task: own.to_numpy() for task, own in self.samples.groupby("group", sort=False)["score"]}

    @property
    def limit(self) -> int | None:
        """evaluation.limit where it left out items of a task."""
        is_limited = any(score["limited"] for score in self.task_scores.values())
        return self.json("evaluation", "tasks.json")["moepress"]["limit"] if is_limited else None

    @cached_property
    def latency(self) -> dict:
        return self.json("latency", "latency.json") if "latency" in self.artefacts else UNTIMED

    @property
    def timed(self) -> list[dict]:
        """Of latency.json the rows of this run's own model under its policy: one a setting."""
        return [row for row in self.latency["rows"] if row["model"] == self.latency["measured"]]

    def speedup(self, phase: str) -> Speedup | None:
        """Of prefill or decode; None of the 16-bit model itself, and where it was not timed."""
        own, base = self.latency[f"{phase}_ms"], self.latency[f"{phase}_ms_16bit"]
        if self.is_reference or not (own and base):
            return None
        value, low, high = (base[of] / own[to] for of, to in (("median", "median"), ("q1", "q3"), ("q3", "q1")))
        return Speedup(value, low, high, own["median"], base["median"])

    @cached_property
    def allocated(self) -> dict:
        return self.json("allocation", "allocation.json")

    @property
    def bits(self) -> list[list[int]]:
        """`[layers][experts]`."""
        return self.allocated["bits"]

    @cached_property
    def sizes(self) -> dict[str, float]:
        """Bytes that were predicted before the checkpoint was made, beside those that were measured: of its weight files
        (`checkpoint_bytes`, `predicted_bytes`), of its folder, and of the model loaded for the evaluation."""
        found = {"checkpoint_bytes": self.checkpoint_bytes, "predicted_bytes": nan, "folder_bytes": nan}
        found |= {
            "predicted_folder_bytes": nan,
            "loaded_bytes": self.metrics["loaded_bytes"] or nan,
            "predicted_loaded_bytes": nan,
        }
        if self.is_quantized:
            found["folder_bytes"] = self.json("quantization", "size.json")["folder_bytes"]
            found |= {name: self.allocated[name] for name in ("predicted_bytes", "predicted_folder_bytes")}
            found["predicted_loaded_bytes"] = self.allocated["predicted_loaded_bytes"][self.metrics["device"]]
        return found

    @cached_property
    def diagnostics(self) -> list[dict]:
        return self.json("quantization", "diagnostics.json")["layers"]

    @cached_property
    def statistics(self) -> dict:
        return self.json("statistics", "statistics.json")

    @cached_property
    def corpus(self) -> dict:
        return self.json("corpus", "summary.json")

    @cached_property
    def model(self) -> Path:
        """The 16-bit model's own folder."""
        folder = folders.locate(self.folder("model"))
        if not list(folder.glob("*.safetensors")):
            raise ValueError(f"{folder}: no *.safetensors there any more, but the run {self.name!r} is measured against it")
        return folder

    @cached_property
    def shape(self) -> families.Shape:
        return folders.read_shape(self.model, "model")

    @cached_property
    def has_shared(self) -> bool:
        """Whether the model has shared experts or dense layers."""
        family = families.FAMILIES[self.shape.family]
        found = folders.tensors(self.model).items()
        return any(families.kind_of(family, name, entry.shape, 8) == "shared" for name, entry in found)

    @cached_property
    def num_weights(self) -> int:
        return folders.num_weights(self.model)

    @cached_property
    def checkpoint_bytes(self) -> int:
        if self.is_quantized:
            return self.json("quantization", "size.json")["checkpoint_bytes"]
        return sum(path.stat().st_size for path in self.model.glob("*.safetensors"))

    @cached_property
    def domains(self) -> tuple[list[str], list[str]]:
        """Evaluated domains, (in domain, out of domain): a domain is out where the corpus keeps neither training nor
        calibration text of it while it does of others."""
        splits = self.corpus["domains"]
        seen = [d for d in self.metrics["domains"] if {"train", "calibration"} & set(splits.get(d, {}))]
        out = [d for d in self.metrics["domains"] if d not in seen]
        return (seen, out) if seen else (out, [])


def shift_by_layer(metrics: dict) -> list[float]:
    """Share of selected slots that differ from the 16-bit model's in each MoE layer, over all blocks of an evaluation's
    metrics.json; [] where nothing was compared."""
    domains = metrics["domains"].values()
    if not all("selection_shift_by_layer" in domain for domain in domains):
        return []
    weights = [domain["num_blocks"] for domain in domains]
    return np.average([domain["selection_shift_by_layer"] for domain in domains], axis=0, weights=weights).tolist()


def compact_json(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
