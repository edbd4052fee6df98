"""From overrides to a checked configuration.

`resolve(overrides)` is the only way to one: Hydra composes conf/, every value is resolved and checked. `values(overrides)` is
its first half, which looks at no file: what `moepress plan` needs, where the model may not be there yet.
"""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moepress import pruning, schema
from moepress.data import settings
from moepress.evaluation import suites
from moepress.models import dense, families, outline
from moepress.quantization.budget import Prediction, plan_budget

ROOT = next(p for p in (Path(__file__).parents[2], Path(__file__).parent) if (p / "conf").is_dir())
"""The folder with conf/, workflow/ and the Snakefile: the checkout, or the installed package."""


def resolve(overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The configuration of one experiment as plain containers, checked.

    overrides: Hydra's, such as `["quantization=gptq", "allocation.bits=3"]`.
    Raises ValueError that names the key, its value and what would do.
    """
    return with_files(values(overrides))


def values(overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The same before the model and the text are looked at: values checked by themselves."""
    try:
        config = OmegaConf.to_container(composed(overrides), resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(readable_error(error, overrides)) from error
    return validate(config)


def readable_error(error: Exception, overrides: list[str] | tuple[str, ...]) -> str:
    """Hydra's or OmegaConf's error in a line, with the keys that exist."""
    return f"{_first_lines(error)}{_known_keys(overrides)}"


def composed(overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """What Hydra composes of these overrides, unresolved.

    The members of a sweep differ in values more than in groups, and choosing groups is what takes Hydra long (.1 s). So a
    choice of groups is composed once, and values are set in a copy by Hydra's own function.
    """
    parsed = [_parsed(override) for override in overrides]
    if any(one.type != OverrideType.CHANGE or one.is_sweep_override() for one in parsed):  # `+a=1`, `~a`: rare
        return deepcopy(_composed(tuple(overrides), _newest_change()))
    choices = tuple(override for override, one in zip(overrides, parsed, strict=True) if _is_choice(one))
    config = deepcopy(_composed(choices, _newest_change()))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _is_choice(one)], config)
    return config


def _is_choice(override: Override) -> bool:
    """Whether it is one of a group's files, or Hydra's own."""
    key = override.key_or_group
    is_group = "/" in key or key in ("experiment", "study") or (ROOT / "conf" / key).is_dir()
    return is_group or override.package is not None or override.is_hydra_override()


@lru_cache(maxsize=512)
def _composed(overrides: tuple[str, ...], _: tuple[int, int]) -> DictConfig:
    """Composed by Hydra from scratch. The second argument only tells the cache that files have changed."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # set where a Hydra app is running
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _newest_change() -> tuple[int, int]:
    """Changes with every file of conf/: a notebook may go on while someone edits them."""
    times = [entry.stat().st_mtime_ns for folder, _, _ in os.walk(ROOT / "conf") for entry in os.scandir(folder)]
    return max(times), len(times)


def validate(config: dict) -> dict:
    """Checked values in their schema's types, with everything that depends on this machine filled in."""
    for key, value in _leaves(config):
        if value == "???":
            raise ValueError(f"{key} is not set: give it as {key}=...")
    config = {name: value for name, value in config.items() if name not in ("experiment", "study")}
    schema.check(isinstance(config["seed"], int), "seed", config["seed"], "a whole number")
    if config["statistics"]["quantizer"] == "auto":
        config["statistics"]["quantizer"] = schema.quantizer_of_statistics(config["quantization"], config["allocation"])
    fits = config["statistics"]["quantizer"] != "gptq" or config["quantization"]["method"] not in ("none", "rtn")
    is_read = schema.reads_statistics(config["allocation"]) and config["quantization"]["method"] != "none"
    expected = f"quantization={config['quantization']['method']} has no error feedback; leave it auto"
    schema.check(fits or not is_read, "statistics.quantizer", "gptq", expected)
    latency = config["latency"]
    latency["threads"] = os.cpu_count() if latency["threads"] == "auto" else latency["threads"]
    latency["hardware"] = hardware(config["device"]) if latency["hardware"] == "auto" else latency["hardware"]
    for group, classes in schema.SCHEMA.items():
        config[group] = _typed(group, classes, config[group])
    ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(config["device"]))
    schema.check(bool(ok), "device", config["device"], "auto, cpu, cuda or cuda:N")

    schema.check(config["out"] is None or isinstance(config["out"], str), "out", config["out"], "a folder, or null")
    objective = config["objective"]
    columns = [objective] if isinstance(objective, str) else objective
    ok = columns is None or (isinstance(columns, list) and columns and all(isinstance(name, str) for name in columns))
    schema.check(ok, "objective", objective, "a column of runs.csv, a list of them, or null")
    suites.chosen(config["evaluation"])
    settings.check(config["corpus"])
    return config


def with_files(config: dict) -> dict:
    """The configuration with what the files say that it names: their fingerprints, and whether the model takes the values."""
    if config["corpus"]["kind"] != "packages":
        source = config["corpus"]["path"] if config["corpus"]["kind"] == "local" else config["corpus"]["id"]
        config["corpus"]["fingerprint"] = _text(config["corpus"]["kind"], source, _stamp(source))
    model = None
    if config["model"]["kind"] == "local":
        model, config["model"]["fingerprint"] = _model(config["model"]["path"], _stamp(config["model"]["path"]))
        if config["model"]["name"] == "local":
            config["model"]["name"] = Path(config["model"]["path"]).resolve().name
    elif config["model"]["kind"] == "tiny":
        # How large its tokenizer will be is not known yet: only what surely does not fit is refused here.
        model = dataclasses.replace(outline.from_recipe(config["model"]), files={})
    elif config["model"]["kind"] == "carved":
        model = dataclasses.replace(outline.from_carving(config["model"]), files={})
        config["model"]["fingerprint"] = dense.fingerprint(config["model"])
        if config["model"]["path"] and config["model"]["name"] == "carved":
            config["model"]["name"] = f"carved-{Path(config['model']['path']).resolve().name}"
    if model and config["pruning"]["method"] == "static":
        pruning.num_removed(config["pruning"]["ratio"], model.shape.num_experts, model.shape.top_k)
    if model and config["quantization"]["method"] != "none":
        families.check_group_size(model.shape, config["quantization"]["group_size"])
        plan_budget(config["allocation"], Prediction(model, config["quantization"]))
    return config


@lru_cache(maxsize=16)
def _model(path: str, _: tuple) -> tuple[outline.Outline, str]:
    """What a model's headers tell, and its fingerprint. The second argument only tells the cache that files have changed."""
    return outline.read(Path(path), "model.path"), families.fingerprint(Path(path))


@lru_cache(maxsize=16)
def _text(kind: str, source: str, _: tuple) -> str | None:
    """The fingerprint of a corpus's files."""
    from moepress.data import corpus  # imports pandas, which no other configuration needs

    return corpus.fingerprint({"kind": kind, "path": source, "id": source})


def _stamp(source: str | None) -> tuple:
    """Names, sizes and times of the files of a folder, or of a file; () where there is none."""
    place = Path(source or "")
    files = sorted(place.rglob("*")) if source and place.is_dir() else [place] if source and place.is_file() else []
    found = ((str(path), path.stat()) for path in files if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


_TYPED: dict[tuple, dict] = {}
"""What has been checked already: members of a sweep share most of their groups."""


def _typed(group: str, classes, values: dict) -> dict:
    if isinstance(classes, dict):
        variant = "kind" if "kind" in values else "method"
        known = ", ".join(classes)
        schema.check(values.get(variant) in classes, f"{group}.{variant}", values.get(variant), f"one of {known}")
        classes = classes[values[variant]]
    try:
        found = (group, classes, repr(values))
        if found not in _TYPED:
            typed = OmegaConf.merge(OmegaConf.structured(classes), values)
            _TYPED[found] = dataclasses.asdict(OmegaConf.to_object(typed))
        return deepcopy(_TYPED[found])
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
    noise = ("full_key", "object_type", "reference_type")
    lines = [line for line in str(error).splitlines() if not line.strip().startswith(noise)]
    return " ".join(line.strip() for line in lines[:4])


def _known_keys(overrides) -> str:
    """The keys that exist beside the first override that does not."""
    for override in overrides:
        name = re.split(r"[=@]", override.lstrip("+~"))[0]
        group, _, key = name.partition(".")
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        if not key and group in ("seed", "device", "cores", "out", "objective"):
            continue
        if not key and not options:
            groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")
            return (
                f"; {group!r} is none of seed, device, cores, out, objective, paths.results, paths.cache or {', '.join(groups)}"
            )
        if not key and override.partition("=")[2] not in options:
            return f"; {group} is one of {', '.join(options)}"
        if key:
            lines = "\n".join(path.read_text() for path in (ROOT / "conf" / group).glob("*.yaml"))
            keys = sorted(set(re.findall(r"^([a-z_]+):", lines, re.MULTILINE)) - {"defaults"})
            if key.split(".")[0] not in keys:
                return f"; keys of {group}: {', '.join(keys)} (some belong to one of {', '.join(options)} only)"
    return ""


def uses_gpu(device: str) -> bool:
    """Whether stages will run on a GPU, found without importing torch."""
    return device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None)


@cache
def hardware(device: str = "auto") -> str:
    """Name of the machine part that latency is measured on, found without importing torch."""
    if uses_gpu(device) and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        if names[0].strip():
            return names[0].strip()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
