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
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
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
    suites.chosen(config["evaluation"])
    settings.check(config["corpus"])
    return config


def with_files(config: dict) -> dict:
    """The configuration with what the files say that it names: their fingerprints, and whether the model takes the values."""
    if config["corpus"]["kind"] != "packages":
        from moepress.data import corpus  # imports pandas, which no other configuration needs

        config["corpus"]["fingerprint"] = corpus.fingerprint(config["corpus"])
    model = None
    if config["model"]["kind"] == "local":
        model = outline.read(Path(config["model"]["path"]), "model.path")
        config["model"]["fingerprint"] = families.fingerprint(Path(config["model"]["path"]))
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
    noise = ("full_key", "object_type", "reference_type")
    lines = [line for line in str(error).splitlines() if not line.strip().startswith(noise)]
    return " ".join(line.strip() for line in lines[:4])


def _known_keys(overrides) -> str:
    """The keys that exist beside the first override that does not."""
    for override in overrides:
        name = re.split(r"[=@]", override.lstrip("+~"))[0]
        group, _, key = name.partition(".")
        options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        if not key and not options:
            groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
            return f"; {group!r} is none of seed, device, cores, out, paths.results, paths.cache or {', '.join(groups)}"
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
