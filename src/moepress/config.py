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
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers.oc import env as plain_environment

from moepress import pruning
from moepress.data import settings
from moepress.evaluation import suites
from moepress.models import dense, families, folders, outline
from moepress.quantization.budget import Prediction, plan_budget
from moepress.schema import SCHEMA
from moepress.schema.allocation import reads_statistics
from moepress.schema.quantization import quantizer_of_statistics
from moepress.schema.values import check, check_leaf, check_seed

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
    for override in overrides:
        if len(override) > LONGEST_OVERRIDE or re.search("[\0\ud800-\udfff]", override):
            raise ValueError(f"{override[:60]!r}: at most {LONGEST_OVERRIDE} characters of text, NUL not among them")
        if len(override.partition("=")[0]) > LONGEST_KEY:
            raise ValueError(f"{override[:60]!r}: no key is longer than {LONGEST_KEY} characters")
    try:
        with guarded_environment():
            config = OmegaConf.to_container(composed(overrides), resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(readable_error(error, overrides)) from error
    except RecursionError as error:
        raise ValueError(f"{max(overrides, key=len)[:60]!r}: nested too deeply") from error
    return validate(config)


LONGEST_OVERRIDE, LONGEST_KEY = 20_000, 100
OPEN_VARIABLES = ("MOEPRESS_CACHE", "HOME")
"""What configurations may take from the environment: conf/config.yaml does."""


@contextmanager
def guarded_environment() -> Iterator[None]:
    """No other variable is told to a configuration, nor to a study that somebody else wrote: what it holds ends in files that
    people publish. On a command line the shell puts in a variable's value."""

    def environment(key: str, default: str | None = None) -> str | None:
        if key not in OPEN_VARIABLES:
            raise ValueError(f"oc.env:{key}: only {' and '.join(OPEN_VARIABLES)} are read; write the value itself")
        return os.environ.get(key, default)

    OmegaConf.register_new_resolver("oc.env", environment, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", plain_environment, replace=True)


def readable_error(error: Exception, overrides: list[str] | tuple[str, ...]) -> str:
    """Hydra's or OmegaConf's error in a line, with the keys that exist."""
    key = getattr(error, "full_key", None)
    return f"{f'{key}: ' if key else ''}{_first_lines(error)}{_known_keys(overrides)}"


def composed(overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """What Hydra composes of these overrides, unresolved.

    The members of a sweep differ in values more than in groups, and choosing groups is what takes Hydra long (.1 s). So a
    choice of groups is composed once, and values are set in a copy by Hydra's own function.
    """
    parsed = []
    for override in overrides:
        try:
            parsed.append(_parsed(override))
        except HydraException as error:
            raise ValueError(f"{override[:200]!r}: {readable_error(error, overrides)}") from error
    for one in parsed:
        value = one.value()
        may_be_none = one.key_or_group in ("experiment", "study")
        is_name = re.fullmatch(r"[\w./-]{1,100}", str(getattr(value, "text", value))) and isinstance(value, str | QuotedString)
        is_name = is_name or (value is None and may_be_none)
        is_ours = _is_choice(one) and not one.is_hydra_override()
        if is_ours and one.type == OverrideType.CHANGE and not one.is_sweep_override() and not is_name:
            raise ValueError(f"{one.key_or_group}={value!r}: give one name{_known_keys([one.input_line])}")
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
    for key, value in config.items():
        check_leaf(key, value)
    for group in SCHEMA:
        check(isinstance(config[group], dict), group, config[group], "a group of keys; choose one by its name")
    check_seed("seed", config["seed"])
    ok = config["cores"] is None or (type(config["cores"]) is int and config["cores"] >= 1)
    check(ok, "cores", config["cores"], "null for all of the machine's, or at least 1")
    check(isinstance(config["paths"], dict), "paths", config["paths"], "the folders results and cache")
    for name, path in config["paths"].items():
        ok = isinstance(path, str) and path.strip() and not path.startswith("-")
        check(bool(ok), f"paths.{name}", path, "a folder")
        check(not set(path) & set("{}*?[]"), f"paths.{name}", path, "a folder without any of {}*?[] in its name")
    if config["statistics"]["quantizer"] == "auto":
        config["statistics"]["quantizer"] = quantizer_of_statistics(config["quantization"], config["allocation"])
    fits = config["statistics"]["quantizer"] != "gptq" or config["quantization"]["method"] not in ("none", "rtn")
    is_read = reads_statistics(config["allocation"]) and config["quantization"]["method"] != "none"
    expected = f"quantization={config['quantization']['method']} has no error feedback; leave it auto"
    check(fits or not is_read, "statistics.quantizer", "gptq", expected)
    latency = config["latency"]
    latency["threads"] = os.cpu_count() if latency["threads"] == "auto" else latency["threads"]
    ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(config["device"]))
    check(bool(ok), "device", config["device"], "auto, cpu, cuda or cuda:N")
    latency["hardware"] = hardware(config["device"]) if latency["hardware"] == "auto" else latency["hardware"]
    for group, classes in SCHEMA.items():
        config[group] = _typed(group, classes, config[group])

    check(config["out"] is None or isinstance(config["out"], str), "out", config["out"], "a folder, or null")
    objective = config["objective"]
    columns = [objective] if isinstance(objective, str) else objective
    ok = columns is None or (isinstance(columns, list) and bool(columns) and all(isinstance(name, str) for name in columns))
    check(ok, "objective", objective, "a column of runs.csv, a list of them, or null")
    suites.chosen(config["evaluation"])
    settings.check(config["corpus"])
    check_splits(config)
    return config


def check_splits(config: dict) -> None:
    """ValueError for a hub corpus without a split that some stage of this experiment reads."""
    if config["corpus"]["kind"] != "hub":
        return
    method, pruned = config["quantization"]["method"], config["pruning"]["method"]
    is_calibrated = method in ("gptq", "qesc") or (method != "none" and reads_statistics(config["allocation"]))
    readers = {"test": "the evaluation", "calibration": None, "train": None}
    if is_calibrated or pruned not in ("none", "pesf"):
        readers["calibration"] = f"quantization={method} with pruning={pruned}"
    if config["model"]["kind"] in ("tiny", "carved"):
        readers["train"] = f"model={config['model']['kind']}"
    for split, reader in readers.items():
        if reader and not config["corpus"]["splits"].get(split):
            raise ValueError(f"corpus.splits.{split} is not set, but {reader} reads that text; name one of the hub's splits")


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
    return outline.read(Path(path), "model.path"), folders.fingerprint(Path(path))


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
        check(str(values.get(variant)) in classes, f"{group}.{variant}", values.get(variant), f"one of {known}")
        classes = classes[values[variant]]
    try:
        found = (group, classes, repr(values))
        if found not in _TYPED:
            typed = OmegaConf.merge(OmegaConf.structured(classes), values)
            _TYPED[found] = dataclasses.asdict(OmegaConf.to_object(typed))
        return deepcopy(_TYPED[found])
    except OmegaConfBaseException as error:
        name = error.full_key or next((name for name, value in values.items() if not _fits(classes, name, value)), None)
        key = f"{group}.{name}" if name else group
        raise ValueError(f"{key}: {_first_lines(error)}") from error


def _fits(schema_class, name: str, value) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(schema_class), {name: value})
    except OmegaConfBaseException:
        return False
    return True


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
