"""From overrides to a checked configuration.

`resolve(overrides)` is the only way to one: Hydra composes conf/, every value is resolved and checked. `values(overrides)` is
its first half, which looks at no file: `moepress plan` needs no more, for the model may not be there yet.
"""

import dataclasses
import os
import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moepress import pruning
from moepress.composing import (
    LONGEST_KEY,
    LONGEST_OVERRIDE,
    check_experiment,
    composed,
    first_lines,
    guarded_environment,
    leaves,
    readable_error,
    without_value,
)
from moepress.data import settings, textfiles
from moepress.evaluation import suites
from moepress.machine import hardware
from moepress.models import dense, families, folders, outline
from moepress.quantization.budget import Prediction, plan_budget
from moepress.quantization.size import check_measured
from moepress.schema import SCHEMA
from moepress.schema.allocation import reads_errors, reads_statistics
from moepress.schema.pruning import is_fitted
from moepress.schema.quantization import quantizer_of_statistics
from moepress.schema.values import check, check_seed, check_value, nearest


def resolve(overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The configuration of one experiment as plain containers, checked.

    overrides: Hydra's, such as `["quantization=gptq", "allocation.bits=3"]`.
    Raises ValueError that names the key, its value and what would do.
    """
    return with_files(values(overrides))


def values(overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The same before the model and the text are looked at: the values alone are checked. Raises ValueError as `resolve`."""
    for override in overrides:
        if len(override) > LONGEST_OVERRIDE or re.search("[\0\ud800-\udfff]", override):
            raise ValueError(f"{override[:60]!r}: at most {LONGEST_OVERRIDE} characters of text, NUL not among them")
        if len(override.partition("=")[0]) > LONGEST_KEY:
            raise ValueError(f"{override[:60]!r}: no key is longer than {LONGEST_KEY} characters")
        if override.startswith("~"):
            raise ValueError(
                f"{override!r}: no key can be left out; give it another value, or null where conf/ says that it may be"
            )
        if override.startswith("+"):  # it would get past what checks keys by their names
            raise ValueError(f"{override!r}: no key can be added; to set one that there is leave out the +")
        if "=" not in override:
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


def validate(config: dict) -> dict:
    """Checked values in their schema's types, with everything that depends on this machine filled in."""
    for key, value in leaves(config):
        if value == "???":
            raise ValueError(f"{key} is not set: give it as {key}=...")
    config = {name: value for name, value in config.items() if name not in ("experiment", "study")}
    for key, value in config.items():
        check_value(key, value)
    for group in SCHEMA:
        check(isinstance(config[group], dict), group, config[group], "a group of keys; choose one by its name")
    _check_alone(config)
    _fill_in(config)
    for group, classes in SCHEMA.items():
        config[group] = _typed(group, classes, config[group])
    _check_together(config)
    return config


def _check_alone(config: dict) -> None:
    """ValueError for a value of a key that is in no group."""
    check_seed("seed", config["seed"])
    ok = config["cores"] is None or (type(config["cores"]) is int and config["cores"] >= 1)
    check(ok, "cores", config["cores"], "null for all of the machine's, or at least 1")
    ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(config["device"]))
    check(bool(ok), "device", config["device"], "auto, cpu, cuda or cuda:N")
    check(isinstance(config["paths"], dict), "paths", config["paths"], "the folders results and cache")
    for name, path in config["paths"].items():
        ok = isinstance(path, str) and path.strip() and not path.startswith("-")
        check(bool(ok), f"paths.{name}", path, "a folder")
        check(not set(path) & set("{}*?[]"), f"paths.{name}", path, "a folder without any of {}*?[] in its name")
    check(config["out"] is None or isinstance(config["out"], str), "out", config["out"], "a folder, or null")
    objective = config["objective"]
    columns = [objective] if isinstance(objective, str) else objective
    ok = columns is None or (isinstance(columns, list) and bool(columns) and all(isinstance(name, str) for name in columns))
    check(ok, "objective", objective, "a column of runs.csv, a list of them, or null")


def _fill_in(config: dict) -> None:
    """What `auto` stands for, where a key depends on it."""
    statistics, latency = config["statistics"], config["latency"]
    if statistics["quantizer"] == "auto":
        statistics["quantizer"] = quantizer_of_statistics(config["quantization"], config["allocation"])
    if latency["threads"] == "auto":
        latency["threads"] = os.cpu_count()
    if latency["hardware"] == "auto":
        latency["hardware"] = hardware(config["device"])


def _check_together(config: dict) -> None:
    """ValueError for values of several keys that do not go together."""
    allocation, statistics, method = config["allocation"], config["statistics"], config["quantization"]["method"]
    if method != "none" and reads_statistics(allocation):
        ok = statistics["quantizer"] != "gptq" or method != "rtn"
        check(ok, "statistics.quantizer", "gptq", f"quantization={method} has no error feedback; leave it auto")
    if method != "none" and reads_errors(allocation):
        check_measured(allocation["widths"], statistics["widths"])
    suites.chosen(config["evaluation"])
    corpus = config["corpus"]
    settings.check(corpus)
    if corpus["kind"] == "packages":
        settings.check_domains(config, corpus["domains"], corpus["test_domains"])
    elif corpus["kind"] == "hub":
        settings.check_domains(config, [Path(corpus["id"]).name.lower()])
    check_splits(config)


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
    return is_calibrated or is_fitted(pruned)


def check_local_text(config: dict) -> None:
    """ValueError for domains that a local text lacks, and for more calibration windows than it can give."""
    corpus = config["corpus"]
    files = textfiles.find(corpus["path"])
    domains = textfiles.domains_of(files, Path(corpus["path"]), corpus["min_documents"])
    settings.check_domains(config, list(dict.fromkeys(domains)))
    if not reads_calibration(config) or sum(file.stat().st_size for file in files) > SMALL_TEXT:
        return
    cuts, share = tuple(corpus[name] for name in _CUTS), corpus["fractions"]["calibration"]
    most = _most_tokens(corpus["path"], corpus["field"], cuts, share, _stamp(corpus["path"]))
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


@lru_cache(maxsize=16)
def _most_tokens(path: str, field: str, cuts: tuple[int, ...], share: float, _: tuple) -> dict[str, int]:
    """Domain -> tokens that its calibration text cannot exceed.

    cuts: the values of _CUTS. share: of the characters, for the calibration. The last argument only tells the cache that files
    have changed. The split takes documents while they fit into its share, and one at least; a token is at least one byte of
    UTF-8, but for two tokens that may stand around each document.
    """
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
    """The configuration with the fingerprints of the files that it names; ValueError where the model or the text that they hold
    does not fit its values."""
    if config["corpus"]["kind"] != "packages":
        source = config["corpus"]["path"] if config["corpus"]["kind"] == "local" else config["corpus"]["id"]
        config["corpus"]["fingerprint"] = _text(config["corpus"]["kind"], source, _stamp(source))
    if config["corpus"]["kind"] == "local":
        check_local_text(config)
    model = None
    if config["model"]["kind"] == "local":
        model, config["model"]["fingerprint"] = _model(config["model"]["path"], _stamp(config["model"]["path"]))
        is_there = (Path(config["model"]["path"]) / "tokenizer.json").is_file()
        missing = "no tokenizer.json in it; save the model's fast tokenizer there"
        check(is_there, "model.path", config["model"]["path"], missing)
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
    if model:
        for group in ("calibration", "evaluation") if reads_calibration(config) else ("evaluation",):
            folders.check_positions(model.config, f"{group}.seq_len", config[group]["seq_len"])
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
        given = f"={str(values[name])[:100]!r}" if name in values else ""
        raise ValueError(f"{key}{given}: {first_lines(error)}") from error


def _fits(schema_class, name: str, value) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(schema_class), {name: value})
    except OmegaConfBaseException:
        return False
    return True
