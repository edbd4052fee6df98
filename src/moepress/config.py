"""From overrides to a checked configuration, and from a configuration to the artefacts it needs.

`resolve(overrides)` is the only way to a configuration: Hydra composes conf/, every value is resolved and checked.
`STAGES` says what each stage reads of it and which stages come before; `artefact(stage, config)` follows that table to a
folder name whose key is a hash of everything that the folder's content depends on.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moepress import schema
from moepress.models import families

ROOT = next(p for p in (Path(__file__).parents[2], Path(__file__).parent) if (p / "conf").is_dir())
"""The folder with conf/, workflow/ and the Snakefile: the checkout, or the installed package."""

OmegaConf.register_new_resolver("python_version", platform.python_version, replace=True)


# --- resolve ---------------------------------------------------------------------------------------------------------


def resolve(overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The configuration of one experiment as plain containers, checked.

    overrides: Hydra's, such as `["quantization=gptq", "allocation.bits=3"]`.
    Raises ValueError that names the key, its value and what would do.
    """
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # set where a Hydra app is running
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{_first_lines(error)}{_known_keys(overrides)}") from error
    finally:
        GlobalHydra.instance().hydra = outer
    return validate(config)


def validate(config: dict) -> dict:
    """Checked values in their schema's types, with everything that depends on files or this machine filled in."""
    for key, value in _leaves(config):
        if value == "???":
            raise ValueError(f"{key} is not set: give it as {key}=...")
    config = {name: value for name, value in config.items() if name not in ("experiment", "study")}
    if config["statistics"]["quantizer"] == "auto":
        config["statistics"]["quantizer"] = "rtn" if config["quantization"]["method"] == "rtn" else "gptq"
    latency = config["latency"]
    latency["threads"] = os.cpu_count() if latency["threads"] == "auto" else latency["threads"]
    latency["hardware"] = hardware(config["device"]) if latency["hardware"] == "auto" else latency["hardware"]
    for group, classes in schema.SCHEMA.items():
        config[group] = _typed(group, classes, config[group])
    schema.check(isinstance(config["seed"], int), "seed", config["seed"], "a whole number")
    ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", str(config["device"]))
    schema.check(bool(ok), "device", config["device"], "auto, cpu, cuda or cuda:N")

    if config["corpus"]["kind"] == "local":
        from moepress.data import corpus  # imports pandas, which no other configuration needs

        config["corpus"]["fingerprint"] = corpus.fingerprint(config["corpus"])
    shape = None
    if config["model"]["kind"] == "local":
        shape = families.read_shape(Path(config["model"]["path"]), "model.path")
        config["model"]["fingerprint"] = families.fingerprint(Path(config["model"]["path"]))
        if config["model"]["name"] == "local":
            config["model"]["name"] = Path(config["model"]["path"]).resolve().name
    elif config["model"]["kind"] == "tiny":
        shape = families.shape_of({"model_type": "mixtral", **config["model"]["architecture"]}, "model.architecture")
    if shape and config["quantization"]["method"] != "none":
        families.check_group_size(shape, config["quantization"]["group_size"])
    return config


def _typed(group: str, classes, values: dict) -> dict:
    if isinstance(classes, dict):
        variant = "kind" if "kind" in values else "method"
        known = ", ".join(classes)
        schema.check(values.get(variant) in classes, f"{group}.{variant}", values.get(variant), f"one of {known}")
        classes = classes[values[variant]]
    try:
        typed = OmegaConf.merge(OmegaConf.structured(classes), values)
        return dataclasses.asdict(OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        key = f"{group}.{error.full_key}" if error.full_key else group
        raise ValueError(f"{key}: {_first_lines(error)}") from error


def _leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if not line.startswith(("    full_key", "    object_type"))]
    return " ".join(line.strip() for line in lines[:4])


def _known_keys(overrides) -> str:
    """The keys that exist beside the first override that does not."""
    for override in overrides:
        name = re.split(r"[=@]", override.lstrip("+~"))[0]
        group, _, key = name.partition(".")
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        if not key and not options:
            groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
            return f"; {group!r} is none of seed, device, cores, paths.results, paths.cache or {', '.join(groups)}"
        if not key and override.partition("=")[2] not in options:
            return f"; {group} is one of {', '.join(options)}"
        if key:
            lines = "\n".join(path.read_text() for path in (ROOT / "conf" / group).glob("*.yaml"))
            keys = sorted(set(re.findall(r"^([a-z_]+):", lines, re.MULTILINE)) - {"defaults"})
            if key.split(".")[0] not in keys:
                return f"; keys of {group}: {', '.join(keys)} (some belong to one of {', '.join(options)} only)"
    return ""


@cache
def hardware(device: str = "auto") -> str:
    """Name of the machine part that latency is measured on, found without importing torch."""
    if device != "cpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        if names[0].strip():
            return names[0].strip()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


# --- stages, keys, artefacts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """version: raised by hand when the stage's meaning changes. reads: the config's groups and keys in its key.
    inputs: config -> {role: (stage, config)}. label: config -> the readable part of the folder's name."""

    version: int
    reads: tuple[str, ...]
    inputs: Callable[[dict], dict]
    label: Callable[[dict], str]


@dataclass(frozen=True)
class Artefact:
    """One folder of results: `<results>/<stage>/<label>-<key>`."""

    stage: str
    key: str
    label: str
    config: dict
    inputs: dict[str, "Artefact"]

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


def _model(c):
    return {"model": ("model", c)}


def _checkpoint(c):
    """What is measured: the packed checkpoint, or the model itself; and the policy it runs under."""
    found = {"checkpoint": ("model" if c["quantization"]["method"] == "none" else "quantization", c)}
    if c["pruning"]["method"] != "none":
        found["pruning"] = ("pruning", c)
    return found


def _allocation_inputs(c):
    return _model(c) if c["allocation"]["method"] == "uniform" else {**_model(c), "statistics": ("statistics", c)}


def _quantization_inputs(c):
    calibration = {} if c["quantization"]["method"] == "rtn" else {"calibration": ("calibration", c)}
    return {**_model(c), **calibration, "allocation": ("allocation", c)}


def _evaluation_inputs(c):
    found = {"corpus": ("corpus", c), **_checkpoint(c)}
    return found if is_reference(c) else {**found, "reference": ("evaluation", reference(c))}


def _size_label(c):
    allocation = c["allocation"]
    size = allocation["budget"] or f"{allocation['bits']:g}"
    return size if allocation["method"] == "uniform" else f"{allocation['method']}-{size}"


def _checkpoint_label(c):
    method = c["quantization"]["method"]
    return "16bit" if method == "none" else f"{method}-{_size_label(c)}"


def run_label(c: dict) -> str:
    """The experiment in a few words: `qesc-pmq-2.5`, `16bit-pesf-0.3`."""
    pruning = c["pruning"]
    return _checkpoint_label(c) + (f"-{pruning['method']}-{pruning['alpha']:g}" if "alpha" in pruning else "")


def _corpus_label(c):
    group = c["corpus"]
    return {"packages": "default", "local": Path(group.get("path") or "").stem}.get(group["kind"], group.get("id"))


_EXPERT_QUANTIZER = ("group_size", "clip_min", "clip_steps", "fit_rounds", "damping", "block_size")

STAGES: dict[str, Stage] = {
    "corpus": Stage(1, ("corpus",), lambda c: {}, _corpus_label),
    "model": Stage(
        1,
        ("model",),
        lambda c: {"corpus": ("corpus", c)} if c["model"]["kind"] == "tiny" else {},
        lambda c: c["model"]["name"],
    ),
    "calibration": Stage(
        1,
        ("calibration",),
        lambda c: {"corpus": ("corpus", c), **_model(c)},
        lambda c: f"{c['calibration']['num_sequences']}x{c['calibration']['seq_len']}",
    ),
    "statistics": Stage(
        1,
        ("statistics", *(f"quantization.{name}" for name in _EXPERT_QUANTIZER)),
        lambda c: {**_model(c), "calibration": ("calibration", c)},
        lambda c: f"{c['model']['name']}-{c['statistics']['quantizer']}",
    ),
    "allocation": Stage(
        1, ("allocation", "quantization.group_size", "quantization.attention_bits"), _allocation_inputs, _size_label
    ),
    "quantization": Stage(1, ("quantization",), _quantization_inputs, _checkpoint_label),
    "pruning": Stage(1, ("pruning",), _model, run_label),
    "evaluation": Stage(1, ("evaluation",), _evaluation_inputs, run_label),
    "latency": Stage(1, ("latency",), lambda c: {"corpus": ("corpus", c), **_checkpoint(c), **_model(c)}, run_label),
}
"""The DAG: what each stage's key depends on. The report, which joins many experiments, is added by `report_artefact`."""

NOT_IN_KEY = {"model": ("path",), "corpus": ("path",)}
"""Where something lies is no part of what it is; its fingerprint is."""


def artefact(stage: str, config: dict) -> Artefact:
    """The artefact of a stage for a configuration, with everything upstream of it."""
    entry = STAGES[stage]
    inputs = {role: artefact(*source) for role, source in entry.inputs(config).items()}
    sliced: dict = {}
    for name in entry.reads:
        group, _, key = name.partition(".")
        if not key:
            sliced[group] = {k: v for k, v in config[group].items() if k not in NOT_IN_KEY.get(group, ())}
        elif key in config[group]:
            sliced.setdefault(group, {})[key] = config[group][key]
    return make_artefact(stage, entry.version, entry.label(config), sliced, inputs)


def make_artefact(stage: str, version: int, label: str, config: dict, inputs: dict[str, Artefact]) -> Artefact:
    upstream = {role: found.key for role, found in inputs.items()}
    content = {"stage": stage, "version": version, "config": config, "inputs": upstream}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    key = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", str(label)).strip("-.")[:60] or stage
    return Artefact(stage, key, safe, config, inputs)


# --- experiments and studies -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """config: resolved. artefacts: stage -> Artefact of the stages with a row to fill."""

    overrides: tuple[str, ...]
    config: dict
    artefacts: dict[str, Artefact]

    @property
    def beside_label(self) -> list[str]:
        """The overrides that the label does not tell."""
        told = ("quantization", "allocation", "allocation.bits", "allocation.budget", "pruning", "pruning.alpha")
        of_all = ("paths.", "tracking", "device", "cores", "model", "corpus", "experiment")
        return [o for o in self.overrides if o.split("=")[0] not in told and not o.startswith(of_all)]


def experiment(overrides: list[str] | tuple[str, ...]) -> Experiment:
    """One experiment from its overrides."""
    config = resolve(overrides)
    stages = ["evaluation", "latency"]
    if config["quantization"]["method"] != "none":
        stages += ["quantization", "allocation"]
    return Experiment(tuple(overrides), config, {stage: artefact(stage, config) for stage in stages})


def run_names(experiments: list[Experiment]) -> list[str]:
    """A name for each row: its label, and the overrides beyond it that not all of the compressed ones share."""
    compressed = [set(e.beside_label) for e in experiments if not is_reference(e.config)]
    shared = set.intersection(*compressed) if compressed else set()
    return [" ".join([run_label(e.config), *(o for o in e.beside_label if o not in shared)]) for e in experiments]


def load_study(name: str) -> dict:
    """`{name, caption, base, experiments}` of conf/study/NAME.yaml."""
    path = ROOT / "conf" / "study" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob("*.yaml")))
        raise ValueError(f"study={name}: no such file in conf/study/; there is {known}")
    return OmegaConf.to_container(OmegaConf.load(path))


def study_experiments(study: dict, overrides: list[str] | tuple[str, ...] = ()) -> list[Experiment]:
    """Every experiment of a study: its own overrides over the study's base, the caller's over both.
    The 16-bit model, which every table is measured against, is put first where the study does not name it."""
    found = [experiment([*study["base"], *shlex.split(line), *overrides]) for line in study["experiments"]]
    for member in list(found):
        base = reference(member.config)
        if not any(artefact("evaluation", base).key == e.artefacts["evaluation"].key for e in found):
            own = [o for o in member.overrides if not o.startswith(("quantization", "allocation", "pruning"))]
            found.insert(0, experiment([*own, "quantization=none"]))
    return found


REPORT_VERSION = 1


def report_artefact(name: str, caption: str, experiments: list[Experiment]) -> Artefact:
    """The report over many experiments: one folder with the table, the figures and the page."""
    inputs: dict[str, Artefact] = {}
    runs = []
    for member, run_name in zip(experiments, run_names(experiments), strict=True):
        stages = dict(member.artefacts)
        stages["model"] = artefact("model", member.config)
        stages["corpus"] = artefact("corpus", member.config)
        if member.config["quantization"]["method"] not in ("none", "rtn"):
            stages["statistics"] = artefact("statistics", member.config)
        if member.config["pruning"]["method"] != "none":
            stages["pruning"] = artefact("pruning", member.config)
        for stage, found in stages.items():
            inputs[f"{stage}-{found.key}"] = found
        describe = {group: member.config[group] for group in ("quantization", "allocation", "pruning")}
        runs.append(
            {
                "run": run_name,
                "seed": member.config["seed"],
                "is_reference": is_reference(member.config),
                **describe,
                "artefacts": {stage: found.folder for stage, found in sorted(stages.items())},
            }
        )
    return make_artefact("report", REPORT_VERSION, name, {"name": name, "caption": caption, "runs": runs}, inputs)


def everything(artefacts: list[Artefact]) -> dict[str, Artefact]:
    """Folder -> artefact, for the given ones and all that they need, upstream first."""
    found: dict[str, Artefact] = {}

    def visit(item: Artefact) -> None:
        for upstream in item.inputs.values():
            visit(upstream)
        found.setdefault(item.folder, item)

    for item in artefacts:
        visit(item)
    return found
