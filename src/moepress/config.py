"""From overrides to a checked configuration.

`resolve(overrides)` is the only way to one: Hydra composes conf/, every value is resolved and checked. `values(overrides)` is
its first half, which looks at no file: what `moepress plan` needs, where the model may not be there yet.
"""

import dataclasses
import importlib.util
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
from moepress.data import settings, textfiles
from moepress.evaluation import suites
from moepress.models import dense, families, folders, outline
from moepress.quantization.budget import Prediction, plan_budget
from moepress.schema import SCHEMA
from moepress.schema.allocation import reads_statistics
from moepress.schema.quantization import quantizer_of_statistics
from moepress.schema.values import check, check_leaf, check_seed, nearest

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
        if "=" not in override and not override.startswith("~"):
            raise ValueError(without_value(override))
    check_experiment(overrides)
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


def check_experiment(overrides: list[str] | tuple[str, ...]) -> None:
    """ValueError for `experiment=NAME` beside another choice of a group that it chooses: Hydra would let that one win."""
    given = _given(overrides)
    for group, option in _choices_of(given.get("experiment")).items():
        if (other := given.get(group, option)) != option:
            chosen = _choices_of(given["experiment"])
            stands_for = " ".join(f"{g}={o}" for g, o in chosen.items())
            instead = " ".join(f"{g}={given.get(g, o)}" for g, o in chosen.items())
            raise ValueError(
                f"experiment={given['experiment']} stands for {stands_for}, which {group}={other} contradicts; leave one of "
                f"the two out, or write {instead} in their place"
            )


def _given(overrides: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Key -> value of overrides that set one; the last counts."""
    return {name: value.strip("'\"") for name, _, value in (override.partition("=") for override in overrides)}


@lru_cache(maxsize=16)
def _defaults(file: str) -> dict[str, str]:
    """Group -> option, of the defaults list of a file of conf/."""
    found = OmegaConf.load(ROOT / "conf" / f"{file}.yaml").get("defaults", [])
    pairs = [pair for item in found if isinstance(item, DictConfig) for pair in item.items()]
    return {str(group).removeprefix("override ").lstrip("/"): option for group, option in pairs}


def _choices_of(experiment: str | None) -> dict[str, str]:
    """What conf/experiment/NAME.yaml chooses; nothing where there is none."""
    return _defaults(f"experiment/{experiment}") if experiment in options("experiment") else {}


def choices(overrides: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Group -> the option that overrides make of it."""
    given = _given(overrides)
    found = _defaults("config") | _choices_of(given.get("experiment"))
    return {group: given.get(group, option) for group, option in found.items()}


def options(group: str) -> list[str]:
    """Names that a group may be given."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")


ALONE = ("seed", "device", "cores", "out", "objective")
"""Keys outside any group."""


def without_value(word: str) -> str:
    """What is wrong with a word that is no KEY=VALUE."""
    if word in groups():
        return f"{word!r}: a group needs a value, {word}={'|'.join(options(word))}"
    if "." in word or word in ALONE:
        return f"{word!r}: a key needs a value, {word}=VALUE"
    return f"{word[:100]!r} is no KEY=VALUE{nearest(word, [*ALONE, *groups()])}"


def readable_error(error: Exception, overrides: list[str] | tuple[str, ...]) -> str:
    """Hydra's or OmegaConf's error in a line, with what there is in the place of what there is not."""
    if told := _unknown_choice(overrides) or _unknown_key(overrides):
        return told
    key = getattr(error, "full_key", None)
    of_hydra = "; conf/hydra/ has the keys of sweeps and jobs" if any(o.startswith("hydra.") for o in overrides) else ""
    said = _first_lines(error).rstrip(".")
    return f"{f'{key}: ' if key else ''}{said}{of_hydra}"


def _unknown_choice(overrides: list[str] | tuple[str, ...]) -> str | None:
    """What is wrong with the first choice of a group that there is not."""
    for override in overrides:
        group, is_set, option = override.partition("=")
        known, option = options(group), option.strip("'\"")
        is_null = option == "null" and group in ("experiment", "study")
        if is_set and "." not in group and known and option not in known and not is_null and not group.startswith("hydra"):
            return f"{group}={option[:100]}: no such choice{nearest(option, known)}; {group} is one of {', '.join(known)}"
    return None


def _unknown_key(overrides: list[str] | tuple[str, ...]) -> str | None:
    """What is wrong with the first key that the chosen groups do not have."""
    chosen = [f"{group}={option}" for group, option in choices(overrides).items() if option in options(group)]
    config = OmegaConf.to_container(_composed(tuple(chosen), _newest_change()), resolve=False)
    for override in overrides:
        name = override.partition("=")[0].lstrip("~")
        if name.startswith(("+", "hydra.", "hydra/")) or "@" in name or name in groups():
            continue
        node, path, said = config, name.split("."), override[:100]
        for depth, part in enumerate(path):
            where = ".".join(path[:depth])
            if isinstance(node, dict) and part not in node:
                return f"{said}: {no_such_key(path, depth, list(node), choices(overrides))}"
            if isinstance(node, list):
                break
            if node is None:
                return f"{said}: {where} is null; give it whole, {where}={{{part}: ...}}"
            if not isinstance(node, dict):
                return f"{said}: {where} is one value and has no keys"
            node = node[part]
    return None


def no_such_key(path: list[str], depth: int, known: list, chosen: dict[str, str]) -> str:
    """What to say of a key that is not among those known at a depth of its path. chosen: group -> option."""
    group, key = path[0], path[depth]
    if depth == 0:
        alone = ", ".join([*ALONE, "paths.results", "paths.cache"])
        return f"{key!r}{nearest(key, [*ALONE, *groups()])} is none of {alone} or {', '.join(groups())}"
    where = ".".join(path[:depth])
    if group not in chosen:
        return f"no such key{nearest(key, known)}; keys of {where}: {', '.join(map(str, known))}"
    has = f"{group}={chosen[group]} has no key {key!r}"
    if owners := [option for option in options(group) if _has(_option(group, option), path[1:])]:
        return f"{has}, which belongs to {'one of ' if len(owners) > 1 else ''}{group}={', '.join(owners)}"
    return f"{has}{nearest(key, known)}; keys of {where}: {', '.join(map(str, known))}"


def _option(group: str, name: str) -> dict:
    """The keys of a group's option with the options that it is based on, unresolved."""
    own = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"), resolve=False)
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return {key: value for base in bases for key, value in _option(group, base).items()} | own


def _has(keys, path: list[str]) -> bool:
    return not path or (isinstance(keys, dict) and path[0] in keys and _has(keys[path[0]], path[1:]))


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
            group = one.key_or_group
            raise ValueError(f"{group}={value!r}: give one name; {group} is one of {', '.join(options(group))}")
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
    if config["corpus"]["kind"] == "packages":
        settings.check_domains(config, config["corpus"]["domains"], config["corpus"]["test_domains"])
    elif config["corpus"]["kind"] == "hub":
        settings.check_domains(config, [Path(config["corpus"]["id"]).name.lower()])
    check_splits(config)
    return config


def check_splits(config: dict) -> None:
    """ValueError for a hub corpus without a split that some stage of this experiment reads."""
    if config["corpus"]["kind"] != "hub":
        return
    readers = {"test": "the evaluation", "calibration": None, "train": None}
    if reads_calibration(config):
        readers["calibration"] = f"quantization={config['quantization']['method']} with pruning={config['pruning']['method']}"
    if config["model"]["kind"] in ("tiny", "carved"):
        readers["train"] = f"model={config['model']['kind']}"
    for split, reader in readers.items():
        if reader and not config["corpus"]["splits"].get(split):
            raise ValueError(f"corpus.splits.{split} is not set, but {reader} reads that text; name one of the hub's splits")


def reads_calibration(config: dict) -> bool:
    """Whether some stage of the experiment reads the calibration text."""
    method, pruned = config["quantization"]["method"], config["pruning"]["method"]
    is_calibrated = method in ("gptq", "qesc") or (method != "none" and reads_statistics(config["allocation"]))
    return is_calibrated or pruned not in ("none", "pesf")


def check_local_text(config: dict) -> None:
    """ValueError for domains that a local text has not, and for more calibration windows than it can have."""
    corpus = config["corpus"]
    files = textfiles.find(corpus["path"])
    domains = textfiles.domains_of(files, Path(corpus["path"]), corpus["min_documents"])
    settings.check_domains(config, list(dict.fromkeys(domains)))
    if not reads_calibration(config) or sum(file.stat().st_size for file in files) > SMALL_TEXT:
        return
    most = _most_tokens(corpus["path"], corpus["field"], *(corpus[name] for name in _CUTS), corpus["fractions"]["calibration"])
    asked = config["calibration"]
    wanted = [domain for domain in asked["domains"] or most if domain in most]
    needed = asked["num_sequences"] // max(1, len(wanted))
    for domain in wanted:
        can = most[domain] // asked["seq_len"]
        if can < needed:
            raise ValueError(
                f"calibration.num_sequences={asked['num_sequences']} with calibration.seq_len={asked['seq_len']} needs "
                f"{needed} windows of {domain!r}, whose calibration split is at most {most[domain]} characters, "
                f"{can} windows; ask for fewer or shorter sequences, choose calibration.domains, "
                "raise corpus.fractions.calibration or give more text"
            )


SMALL_TEXT = 1 << 24
"""Bytes up to which a local text is read to see whether it suffices: a larger one takes long, and suffices."""
_CUTS = ("min_documents", "block_characters", "line_characters")


def _most_tokens(path: str, field: str, *rest) -> dict[str, int]:
    """Domain -> tokens that its calibration text cannot exceed."""
    return _bounds(path, field, rest, _stamp(path))


@lru_cache(maxsize=16)
def _bounds(path: str, field: str, rest: tuple, _: tuple) -> dict[str, int]:
    """A document is given to the calibration split while it fits into its share of the characters, and one at least; a token
    is a byte of UTF-8 or more, but for two around each document."""
    *cuts, share = rest
    documents: dict[str, list[str]] = {}
    for domain, _name, text in textfiles.read({"path": path, "field": field, **dict(zip(_CUTS, cuts, strict=True))}):
        documents.setdefault(domain, []).append(text)
    found = {}
    for domain, texts in documents.items():
        characters = max(share * sum(map(len, texts)), *map(len, texts), 0)
        widest = max((len(text.encode()) / len(text) for text in texts if text), default=1)
        found[domain] = int(characters * widest) + 2 * len(texts)
    return found


def with_files(config: dict) -> dict:
    """The configuration with what the files say that it names: their fingerprints, and whether the model takes the values."""
    if config["corpus"]["kind"] != "packages":
        source = config["corpus"]["path"] if config["corpus"]["kind"] == "local" else config["corpus"]["id"]
        config["corpus"]["fingerprint"] = _text(config["corpus"]["kind"], source, _stamp(source))
    if config["corpus"]["kind"] == "local":
        check_local_text(config)
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
    known = [field.name for field in dataclasses.fields(classes)]
    chosen = next((f"{group}.{name}={values[name]} " for name in ("kind", "method") if name in values), "")
    for name in values:
        if name not in known:
            raise ValueError(f"{group}.{name}: {chosen}has no such key{nearest(str(name), known)}; keys: {', '.join(known)}")
    for name in known:
        if name not in values:
            raise ValueError(f"{group}.{name} is missing, which {chosen}needs; choose {group}=NAME, which brings all its keys")
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
    """Without OmegaConf's notes, and without Hydra's advice to append keys, which no schema takes."""
    noise = ("full_key", "object_type", "reference_type", "To append to your", "Config search path", "provider=")
    text = re.sub(r":\s*\n\t", ": ", str(error)).replace("\n\t", ", ")  # a list of options
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return " ".join(lines[:4])


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


def check_gpu(device: str) -> None:
    """ValueError for a GPU where this machine has none, or a torch that knows of none; where stages run here. No import of
    torch."""
    if not device.startswith("cuda"):
        return
    driver = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/kfd")  # NVIDIA, under Windows, on a Jetson; AMD
    check(bool(shutil.which("nvidia-smi") or any(map(os.path.exists, driver))), "device", device, NO_GPU)
    found = importlib.util.find_spec("torch")
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = version.read_text(encoding="utf-8") if version and version.is_file() else ""
    is_without = all(re.search(rf"^{name}\b.*= None", text, re.MULTILINE) for name in ("cuda", "hip"))
    check(
        not is_without, "device", device, "the torch that is installed is for CPUs only; install one with CUDA, or device=cpu"
    )


NO_GPU = "this machine has no GPU (no nvidia-smi); take device=cpu or auto, or jobs elsewhere: hydra.launcher.executor=slurm"
