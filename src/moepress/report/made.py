"""How a checkpoint was made: what its model card says, gathered from the folders that the quantization read."""

import re
import shlex
from pathlib import Path

import numpy as np
import yaml

from moepress.artefacts import Task, git_commit, read_json, versions
from moepress.composing import leaves, option_values, options, override_value
from moepress.models import folders
from moepress.models.families import Shape
from moepress.models.folders import locate
from moepress.schema.quantization import quantizer_of_statistics

VARIANT = {"model": "kind", "corpus": "kind", "allocation": "method", "quantization": "method"}
"""Groups that the command names by their option in conf/, and the key that tells their options apart."""
MACHINE = ("path", "fingerprint")
"""Keys that say where something lies or what it hashes to."""


def facts(task: Task, shape: Shape) -> dict:
    """Everything that the card of a just written checkpoint (`task.out`, with its size.json) says, as plain JSON values."""
    model = locate(task.inputs["model"])
    groups = settings(task)
    allocated = read_json(task.inputs["allocation"] / "allocation.json")
    read = groups.get("calibration") if "calibration" in task.inputs else None
    return {
        "base_model": base_model(groups["model"], model, task.inputs["model"].name.rpartition("-")[0]),
        "licence": licence(model),
        "shape": vars(shape),
        "weights": folders.num_weights(model),
        **read_json(task.out / "size.json"),
        "bits_nominal": float(np.mean([width for layer in allocated["bits"] for width in layer])),
        "bits": allocated["bits"],
        "layers": allocated["layers"],
        "preset": closest("quantization", groups["quantization"], groups)[0],
        "quantization": task.config["quantization"],
        "allocation": groups["allocation"],
        "calibration": read,
        "command": command(groups, model.name),
        "not_told": sorted(VARIANT.keys() - groups.keys()),
        "key": task.key,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def settings(task: Task) -> dict[str, dict]:
    """The configuration groups that the quantization's key depends on, from the config.yaml of everything upstream. Folders
    beyond the stage's own inputs may have been deleted; what only they could tell is not there."""
    found: dict[str, dict] = {}

    def visit(folder: Path) -> None:
        if not (folder / "config.yaml").is_file():
            return
        described = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        for group, values in described["config"].items():
            found[group] = values | found.get(group, {})
        for name in described["inputs"].values():
            visit(folder.resolve().parent.parent / name)

    for role, folder in task.inputs.items():
        if role != "distillation":  # a calibration too; what differs in it follows from the quantization's group
            visit(folder)
    return found | task.config


def base_model(config: dict, folder: Path, label: str) -> str:
    """The 16-bit model's hub id where it has one (by the configuration, or by the hub's cache), else its name."""
    if config["kind"] == "hub":
        return config["id"]
    cached = [part for part in folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else label


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name`, `license_link` of the front matter of a model folder's README.md, as far as it has them."""
    path = folder / "README.md"
    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8"), re.DOTALL) if path.is_file() else None
    try:
        values = yaml.safe_load(matter.group(1)) if matter else {}
    except yaml.YAMLError:
        values = {}
    names = ("license", "license_name", "license_link")
    return {name: values[name] for name in names if isinstance(values, dict) and isinstance(values.get(name), str)}


def command(groups: dict[str, dict], model_name: str) -> str:
    """The command that makes the same checkpoint again: the options of conf/, and every value that is not theirs.
    A folder of the user's own is named by its last part."""
    words = []
    for group in [*(name for name in VARIANT if name in groups), *(name for name in groups if name not in VARIANT)]:
        option, changed = closest(group, groups[group], groups)
        words += [f"{group}={option}"] if group in VARIANT else []
        if group in ("model", "corpus") and groups[group].get("kind") == "local":
            words.append(f"{group}.path={_value(model_name if group == 'model' else 'TEXTS')}")
        words += [f"{'seed' if key == 'calibration.seed' else key}={_value(value)}" for key, value in changed.items()]
    return shlex.join(["moepress", *words])


def closest(group: str, values: dict, groups: dict[str, dict]) -> tuple[str, dict]:
    """The option of conf/GROUP/ that the values differ least from, and the differing ones, by full key."""
    found = {}
    for option in options(group):
        defaults = dict(leaves(option_values(group, option), group))
        variant = f"{group}.{VARIANT.get(group)}"
        if group not in VARIANT or defaults.get(variant) == values.get(VARIANT[group]):
            changed = {key: value for key, value in leaves(values, group) if _differs(key, value, defaults.get(key), groups)}
            found[option] = changed
    if not found:  # conf/ has lost the option
        return values[VARIANT[group]], dict(leaves(values, group))
    return min(found.items(), key=lambda item: len(item[1]))


def _differs(key: str, value, default, groups: dict[str, dict]) -> bool:
    if key.rpartition(".")[2] in MACHINE:
        return False
    if key == "statistics.quantizer":
        return value != quantizer_of_statistics(groups["quantization"], groups["allocation"])
    if key in ("calibration.seed", "allocation.seed"):
        return value != (groups.get("calibration", {}).get("seed", 0) if key == "allocation.seed" else 0)
    return value != default and not str(default).startswith("${")


def _value(value) -> str:
    """A value as a person would type it behind `key=`: numbers, budgets and names without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[\w./:@-]+", value, re.ASCII):
        return value
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return override_value(value)
