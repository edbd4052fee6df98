"""The DAG: what each stage reads of a configuration, what comes before it, and the key that follows from both.

`artefact(stage, config)` follows the table STAGES to a folder name whose key is a hash of everything that the folder's
content depends on. The same experiment asked for through any door has the same keys.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from moepress import pruning
from moepress.schema.allocation import reads_gradients, reads_statistics
from moepress.schema.pruning import is_fitted


@dataclass(frozen=True)
class Stage:
    """version: raised by hand when the stage's meaning changes. keys: the groups (`model`) and single keys
    (`quantization.group_size`) of the configuration that enter the artefact's key. inputs: config -> {role: (stage, config)}.
    label: config -> the readable part of the folder's name. parts: like inputs, but of work that may be split over jobs and is
    only put together here: however it was split the bytes are the same, so parts do not enter the key."""

    version: int
    keys: tuple[str, ...]
    inputs: Callable[[dict], dict]
    label: Callable[[dict], str]
    parts: Callable[[dict], dict] = lambda c: {}


@dataclass(frozen=True)
class Artefact:
    """One folder of results: `<results>/<stage>/<label>-<key>`. parts: read like inputs, but no part of the key."""

    stage: str
    key: str
    label: str
    config: dict
    inputs: dict[str, "Artefact"]
    parts: dict[str, "Artefact"] = field(default_factory=dict)

    @property
    def reads(self) -> dict[str, "Artefact"]:
        """Role -> artefact, of all that the stage is given."""
        return self.inputs | self.parts

    @property
    def id(self) -> str:
        return f"{self.label}-{self.key}"

    @property
    def folder(self) -> str:
        """Relative to the results folder."""
        return f"{self.stage}/{self.id}"


def reference(config: dict) -> dict:
    """The same experiment with the 16-bit model, nothing pruned."""
    quantization = {"method": "none", "group_size": 0}
    return {**config, "quantization": quantization, "pruning": {"method": "none"}}


def is_reference(config: dict) -> bool:
    return config["quantization"]["method"] == "none" and config["pruning"]["method"] == "none"


def is_diverged(config: dict) -> bool:
    """Whether its predictions are held against the 16-bit model's."""
    return config["evaluation"]["divergence"] and not is_reference(config)


def is_decomposed(config: dict) -> bool:
    """Whether the quantized model is taken apart too: its errors of selection and of weights alone."""
    quantized, pruned = (config[group]["method"] != "none" for group in ("quantization", "pruning"))
    return quantized and config["evaluation"]["decomposition"] and not pruned


def _model(c):
    return {"model": ("model", c)}


def _checkpoint(c):
    """What is measured: the packed checkpoint, or the model itself; and the policy it runs under."""
    found = {"checkpoint": ("model" if c["quantization"]["method"] == "none" else "quantization", c)}
    if c["pruning"]["method"] != "none":
        found["pruning"] = ("pruning", c)
    return found


def _allocation_inputs(c):
    return {**_model(c), "statistics": ("statistics", c)} if reads_statistics(c["allocation"]) else _model(c)


def _statistics_inputs(c):
    found = {**_model(c), "calibration": ("calibration", c)}
    return {**found, "gradients": ("gradients", c)} if reads_gradients(c["allocation"]) else found


def _statistics_parts(c):
    """Each block of layers as a job of its own, where there are several."""
    count = c["statistics"]["blocks"]
    blocks = [{**c, "statistics": {**c["statistics"], "block": [i, count]}} for i in range(count)] if count > 1 else []
    return {f"block-{i:02d}": ("statistics_block", block) for i, block in enumerate(blocks)}


def _quantization_inputs(c):
    calibration = {} if c["quantization"]["method"] == "rtn" else {"calibration": ("calibration", c)}
    if calibration and (wanted := distill_sequences(c)) is not None:
        calibration["distillation"] = ("calibration", {**c, "calibration": {**c["calibration"], "at_most": wanted}})
    return {**_model(c), **calibration, "allocation": ("allocation", c)}


def distill_sequences(c: dict) -> int | None:
    """How many sequences the tuning of the whole packed model draws: those configured, but no more than its steps read. None
    where it has no sample of its own: it is off, or reads the calibration's."""
    quantization = c["quantization"]
    if not quantization.get("distill_steps") or quantization["distill_sequences"] is None:
        return None
    each = max(1, quantization["tune_tokens"] // c["calibration"]["seq_len"])
    return min(quantization["distill_sequences"], quantization["distill_steps"] * each)


def _pruning_inputs(c):
    """PESF has nothing to fit; the others are fitted on what is pruned."""
    if is_fitted(c["pruning"]["method"]):
        return {"checkpoint": _checkpoint(c)["checkpoint"], "calibration": ("calibration", c)}
    return _model(c)


def _evaluation_inputs(c):
    found = {"corpus": ("corpus", c), **_checkpoint(c)}
    return found if is_reference(c) else {**found, "reference": ("evaluation", reference(c))}


def _decomposition_inputs(c):
    found = {"corpus": ("corpus", c), **_model(c), "checkpoint": ("quantization", c)}
    return found | {"reference": ("evaluation", reference(c))}


def _size_label(c):
    allocation = c["allocation"]
    size = allocation["budget"] or f"{allocation['bits']:g}"
    return size if allocation["method"] == "uniform" else f"{allocation['method']}-{size}"


def _checkpoint_label(c):
    quantization = c["quantization"]
    return "16bit" if quantization["method"] == "none" else f"{quantization['name']}-{_size_label(c)}"


def run_label(c: dict) -> str:
    """The experiment in a few words: `qesc-pmq-2.5`, `16bit-pesf-0.3`, `gptq-3-odp-median-2%`."""
    pruned = pruning.label(c["pruning"]).lower().replace(" ", "-")
    return f"{_checkpoint_label(c)}-{pruned}" if pruned else _checkpoint_label(c)


def _corpus_label(c):
    group = c["corpus"]
    return {"packages": "default", "local": Path(group.get("path") or "").stem}.get(group["kind"], group.get("id"))


_EXPERT_QUANTIZER = (
    *("group_size", "clip_min", "clip_max", "clip_steps", "clip_ends", "clip_norm", "clip_weighted", "fit_rounds"),
    *("zero_steps", "one_bit", "damping", "block_size", "act_order", "deferred_bits", "refine_rounds"),
)
"""What of conf/quantization/ changes the error of an expert at a width."""

_STATISTICS_VERSION = 3
_STATISTICS_KEYS = ("statistics", *(f"quantization.{name}" for name in _EXPERT_QUANTIZER))

_TEXT = ("seq_len", "num_blocks", "stride", "separator", "domains", "batch_size")

_SIZES = ("group_size", "attention_bits", "shared_bits")

STAGES: dict[str, Stage] = {
    "corpus": Stage(1, ("corpus",), lambda c: {}, _corpus_label),
    "model": Stage(
        1,
        ("model",),
        lambda c: {"corpus": ("corpus", c)} if c["model"]["kind"] in ("tiny", "carved") else {},
        lambda c: c["model"]["name"],
    ),
    "calibration": Stage(
        2,
        ("calibration",),
        lambda c: {"corpus": ("corpus", c), **_model(c)},
        lambda c: f"{c['calibration'].get('at_most', c['calibration']['num_sequences'])}x{c['calibration']['seq_len']}",
    ),
    "gradients": Stage(
        1,
        ("gradients",),
        lambda c: {**_model(c), "calibration": ("calibration", c)},
        lambda c: f"{c['model']['name']}-{c['gradients']['num_sequences']}",
    ),
    "statistics_block": Stage(
        _STATISTICS_VERSION,
        _STATISTICS_KEYS,
        _statistics_inputs,
        lambda c: "{}-{}-{}-of-{}".format(c["model"]["name"], c["statistics"]["quantizer"], *c["statistics"]["block"]),
    ),
    "statistics": Stage(
        _STATISTICS_VERSION,
        _STATISTICS_KEYS,
        _statistics_inputs,
        lambda c: f"{c['model']['name']}-{c['statistics']['quantizer']}",
        _statistics_parts,
    ),
    "allocation": Stage(4, ("allocation", *(f"quantization.{name}" for name in _SIZES)), _allocation_inputs, _size_label),
    "quantization": Stage(3, ("quantization",), _quantization_inputs, _checkpoint_label),
    "pruning": Stage(1, ("pruning",), _pruning_inputs, run_label),
    "evaluation": Stage(4, ("evaluation",), _evaluation_inputs, run_label),
    "divergence": Stage(
        1,
        tuple(f"evaluation.{name}" for name in _TEXT),
        lambda c: {"corpus": ("corpus", c), **_model(c), **_checkpoint(c)},
        run_label,
    ),
    "decomposition": Stage(1, tuple(f"evaluation.{name}" for name in _TEXT), _decomposition_inputs, _checkpoint_label),
    "latency": Stage(3, ("latency",), lambda c: {"corpus": ("corpus", c), **_checkpoint(c), **_model(c)}, run_label),
}
"""The DAG: what each stage's key depends on. The report, which joins many experiments, is added by `report_artefact`."""

NOT_IN_KEY = {
    "model": ("path", "name"),
    "corpus": ("path",),
    "quantization": ("name",),
    "evaluation": ("divergence", "decomposition"),
    "latency": ("model", "num_layers", "skew"),
    "statistics": ("blocks",),
}
"""Where something lies and how it is called is no part of what it is; its fingerprint is. Some folders of results have the
model's name in their labels, though: where a model folder is renamed, those of model, statistics and gradients are made anew
under the same keys; `model.name=OLD` keeps them (docs/guide.md). Divergence and decomposition are stages, and the shapes of
latency.model have artefacts of their own, see `shape_artefact`. In how many jobs statistics are computed changes no number."""


def artefact(stage: str, config: dict) -> Artefact:
    """The artefact of a stage for a configuration, with everything upstream of it."""
    entry = STAGES[stage]
    inputs = {role: artefact(*source) for role, source in entry.inputs(config).items()}
    sliced: dict = {}
    for name in entry.keys:
        group, _, key = name.partition(".")
        if not key:
            sliced[group] = {k: v for k, v in config[group].items() if k not in NOT_IN_KEY.get(group, ())}
        elif key in config[group]:
            sliced.setdefault(group, {})[key] = config[group][key]
    made = make_artefact(stage, entry.version, entry.label(config), sliced, inputs)
    return replace(made, parts={role: artefact(*source) for role, source in entry.parts(config).items()})


def make_artefact(stage: str, version: int, label: str, config: dict, inputs: dict[str, Artefact]) -> Artefact:
    """The artefact whose key is a hash of its stage, that stage's version, its slice of the configuration and the keys of its
    inputs; the label is for people."""
    upstream = {role: found.key for role, found in inputs.items()}
    content = {"stage": stage, "version": version, "config": config, "inputs": upstream}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    key = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", str(label)).strip("-.")[:60] or stage
    return Artefact(stage, key, safe, config, inputs)


def shape_artefact(config: dict, shape: dict) -> Artefact:
    """The times of layers of a real model's shape with random weights. config: as `values` gives it; shape: of
    conf/latency/models/."""
    names = {"latency": tuple(config["latency"]), "quantization": _SIZES, "allocation": ("method", "bits", "widths")}
    sliced = {group: {name: config[group].get(name) for name in found} for group, found in names.items()}
    label = f"{config['latency']['model']}-{config['allocation']['bits']:g}-{pruning.label(config['pruning']).lower()}"
    sliced |= {"pruning": config["pruning"], "shape": shape}
    return make_artefact("latency", STAGES["latency"].version, label, sliced, {})


def everything(artefacts: list[Artefact]) -> dict[str, Artefact]:
    """Folder -> artefact, for the given ones and all that they need, upstream first."""
    found: dict[str, Artefact] = {}

    def visit(item: Artefact) -> None:
        for upstream in item.reads.values():
            visit(upstream)
        found.setdefault(item.folder, item)

    for item in artefacts:
        visit(item)
    return found
