"""Composing conf/ and overrides with Hydra, and one-line errors, with the way out, for overrides that do not fit."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers.oc import env as plain_environment

from moepress.schema.values import LONGEST, nearest

ROOT = next(p for p in (Path(__file__).parents[2], Path(__file__).parent) if (p / "conf").is_dir())
"""The folder with conf/, workflow/ and the Snakefile: the checkout, or the installed package."""
LONGEST_OVERRIDE, LONGEST_KEY = 20_000, 100
OPEN_VARIABLES = ("MOEPRESS_CACHE", "HOME")
"""What configurations may take from the environment: conf/config.yaml does."""


@contextmanager
def guarded_environment() -> Iterator[None]:
    """Inside, configurations can read only OPEN_VARIABLES from the environment (`${oc.env:...}`): what they hold ends in files
    that people publish, and a study may be somebody else's. On a command line the shell expands variables itself."""

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
    """ValueError for `experiment=NAME` beside another option of a group that NAME itself sets: Hydra would let the other win,
    and the run would not be what its name says."""
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
    """Group -> the option that is in force under these overrides."""
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
    """The error for a word that is no KEY=VALUE."""
    if word in groups():
        return f"{word!r}: a group needs a value, {word}={'|'.join(options(word))}"
    if "." in word or word in ALONE:
        return f"{word!r}: a key needs a value, {word}=VALUE"
    return f"{word[:100]!r} is no KEY=VALUE{nearest(word, [*ALONE, *groups()])}"


def readable_error(error: Exception, overrides: list[str] | tuple[str, ...]) -> str:
    """Hydra's or OmegaConf's error in one line; for an unknown option or key, with those that there are."""
    if told := _unknown_choice(overrides) or _unknown_key(overrides):
        return told
    key = getattr(error, "full_key", None)
    of_hydra = "; conf/hydra/ has the keys of sweeps and jobs" if any(o.startswith("hydra.") for o in overrides) else ""
    said = first_lines(error).rstrip(".")
    return f"{f'{key}: ' if key else ''}{said}{of_hydra}"


def in_quotes(override: str) -> str:
    """The way out where Hydra's grammar stops at a character of a text, such as a path's `~`, `(` or `ü`: quotes inside of the
    shell's; nothing where these do not help."""
    key, _, value = override[:LONGEST].partition("=")
    quoted = f"{key}={in_double_quotes(os.path.expanduser(value))}"  # a shell leaves the ~ behind a = as it is
    try:
        _parsed(quoted)
    except HydraException:
        return ""
    return f"; if it is a text, it needs quotes of its own within the shell's: {shlex.quote(quoted)}"


def _unknown_choice(overrides: list[str] | tuple[str, ...]) -> str | None:
    """The error for the first override that asks for an option that its group does not have; None without one."""
    for override in overrides:
        group, is_set, option = override.partition("=")
        known, option = options(group), option.strip("'\"")
        if is_set and "." not in group and known and option not in known and not group.startswith("hydra"):
            said = f"{group}={option[:100]}: no such choice{nearest(option, known)}; {group} is one of {', '.join(known)}"
            is_path = "/" in option and "local" in known
            return f"{said}; a folder of your own is {group}=local {group}.path={option[:100]}" if is_path else said
    return None


def _unknown_key(overrides: list[str] | tuple[str, ...]) -> str | None:
    """The error for the first override of a key that the chosen groups do not have; None without one."""
    chosen = [f"{group}={option}" for group, option in choices(overrides).items() if option in options(group)]
    config = OmegaConf.to_container(_composed(tuple(chosen), _newest_change()), resolve=False)
    for override in overrides:
        name = override.partition("=")[0]
        if name.startswith(("+", "~", "hydra.", "hydra/")) or "@" in name or name in groups():
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
    """The error for a key (`path[depth]` of the full path) that is not among those known there. chosen: group -> option."""
    group, key = path[0], path[depth]
    if depth == 0:
        alone = ", ".join([*ALONE, "paths.results", "paths.cache"])
        return f"{key!r}{nearest(key, [*ALONE, *groups()])} is none of {alone} or {', '.join(groups())}"
    where = ".".join(path[:depth])
    if group not in chosen:
        return f"no such key{nearest(key, known)}; keys of {where}: {', '.join(map(str, known))}"
    has = f"{group}={chosen[group]} has no key {key!r}"
    if owners := [option for option in options(group) if _has(option_values(group, option), path[1:])]:
        return f"{has}, which belongs to {'one of ' if len(owners) > 1 else ''}{group}={', '.join(owners)}"
    return f"{has}{nearest(key, known)}; keys of {where}: {', '.join(map(str, known))}"


def option_values(group: str, name: str) -> dict:
    """The values of conf/GROUP/NAME.yaml over those of the options that it builds on, unresolved."""
    own = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"), resolve=False)
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return {key: value for base in bases for key, value in option_values(group, base).items()} | own


def _has(keys, path: list[str]) -> bool:
    return not path or (isinstance(keys, dict) and path[0] in keys and _has(keys[path[0]], path[1:]))


def composed(overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """What Hydra composes of these overrides, unresolved. Raises ValueError for an override that is none.

    Choosing groups is what takes Hydra long (.1 s), and the members of a sweep mostly share their groups. So each choice of
    groups is composed once, and values are set in a copy of it by Hydra's own function.
    """
    parsed = []
    for override in overrides:
        try:
            parsed.append(_parsed(override))
        except HydraException as error:
            raise ValueError(f"{override[:200]!r}: {readable_error(error, overrides)}{in_quotes(override)}") from error
    for one in parsed:
        value = one.value()
        is_name = re.fullmatch(r"[\w./-]{1,100}", str(getattr(value, "text", value))) and isinstance(value, str | QuotedString)
        is_ours = _is_choice(one) and not one.is_hydra_override()
        if is_ours and one.type == OverrideType.CHANGE and not one.is_sweep_override() and not is_name:
            group, said = one.key_or_group, "null" if value is None else repr(value)
            raise ValueError(f"{group}={said}: give one name; {group} is one of {', '.join(options(group))}")
    if any(one.type != OverrideType.CHANGE or one.is_sweep_override() for one in parsed):  # `+a=1`, `~a`: rare
        return deepcopy(_composed(tuple(overrides), _newest_change()))
    choices = tuple(override for override, one in zip(overrides, parsed, strict=True) if _is_choice(one))
    config = deepcopy(_composed(choices, _newest_change()))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _is_choice(one)], config)
    return config


def _is_choice(override: Override) -> bool:
    """Whether an override chooses an option of a group, or is Hydra's own."""
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


def launcher(overrides: list[str]) -> DictConfig:
    """Hydra's node of the launcher's settings under `hydra.KEY=` overrides; no other key is looked at."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=overrides, return_hydra_config=True).hydra.launcher


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """`(key, value)` of everything in nested dicts that is no dict itself, keys joined by dots below `path`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def override_value(value) -> str:
    """A Python value in the grammar of Hydra's overrides, as it stands behind `key=`. value: None, bool, a number, text, or
    lists and dicts of these. The words null, true and false mean what they mean there."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {override_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_value, value)) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", text, re.ASCII):
        return text
    return in_double_quotes(text)


def in_double_quotes(text: str) -> str:
    """A text in the grammar of Hydra's overrides, whatever its characters."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _newest_change() -> tuple[int, int]:
    """Changes with every file of conf/: a notebook may go on while someone edits them."""
    times = [entry.stat().st_mtime_ns for folder, _, _ in os.walk(ROOT / "conf") for entry in os.scandir(folder)]
    return max(times), len(times)


def first_lines(error: Exception) -> str:
    """Without OmegaConf's notes, and without Hydra's advice to append keys, which no schema takes."""
    noise = ("full_key", "object_type", "reference_type", "To append to your", "Config search path", "provider=")
    text = re.sub(r":\s*\n\t", ": ", str(error)).replace("\n\t", ", ")  # a list of options
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return " ".join(lines[:4])
