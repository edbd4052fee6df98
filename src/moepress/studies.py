"""Experiments, studies of them, and the report that joins them: what is asked for, as artefacts of the DAG."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moepress.composing import ROOT, first_lines
from moepress.config import resolve
from moepress.dag import (
    Artefact,
    artefact,
    everything,
    is_decomposed,
    is_diverged,
    is_reference,
    make_artefact,
    reference,
    run_label,
)
from moepress.schema.allocation import reads_statistics

MEASURED = ("evaluation", "latency", "quantization", "allocation", "divergence", "decomposition")
"""Stages that fill a row, as far as an experiment has them."""


@dataclass(frozen=True)
class Experiment:
    """config: resolved. artefacts: stage -> Artefact of those of MEASURED that it has."""

    overrides: tuple[str, ...]
    config: dict
    artefacts: dict[str, Artefact]

    @property
    def results(self) -> Path:
        return Path(self.config["paths"]["results"]).expanduser()

    @property
    def missing(self) -> set[str]:
        """Stages with something that is yet to be made for it."""
        needed = everything([*self.artefacts.values()])
        return {item.stage for folder, item in needed.items() if not (self.results / folder).exists()}

    @property
    def beside_label(self) -> list[str]:
        """The overrides that `run_label` does not show; for a 16-bit model only those of groups that its numbers depend on."""
        if is_reference(self.config):
            return [o for o in self.overrides if o.lstrip("+~").startswith(("model", "corpus", "evaluation", "latency"))]
        told = ("quantization", "allocation", "allocation.bits", "allocation.budget")
        of_none = ("paths.", "tracking", "device", "cores", "out", "objective", "experiment", "pruning")
        return [o for o in self.overrides if o.split("=")[0] not in told and not o.startswith(of_none)]


def experiment(overrides: list[str] | tuple[str, ...]) -> Experiment:
    """One experiment from its overrides."""
    config = resolve(overrides)
    if name := config["latency"]["model"]:
        raise ValueError(f"latency.model={name}: no experiment, but a shape to time: moepress latency latency.model={name} ...")
    stages = ["evaluation", "latency"] if config["latency"]["repeats"] else ["evaluation"]
    if config["quantization"]["method"] != "none":
        stages += ["quantization", "allocation"]
    if is_diverged(config):
        stages += ["divergence"]
    if is_decomposed(config):
        stages += ["decomposition"]
    return Experiment(tuple(overrides), config, {stage: artefact(stage, config) for stage in stages})


def run_names(experiments: list[Experiment]) -> list[str]:
    """A name for each row of a report: its label and those of its other overrides that not every row shares (16-bit models and
    compressed ones are looked at apart). Rows that would still have one name get all overrides in which they differ."""
    listed: dict[bool, list[set[str]]] = {True: [], False: []}
    for member in experiments:
        listed[is_reference(member.config)].append(set(member.beside_label))
    shared = {kind: set.intersection(*found) for kind, found in listed.items() if found}
    names = [
        " ".join([run_label(e.config), *(o for o in e.beside_label if o not in shared[is_reference(e.config)])])
        for e in experiments
    ]
    for name in {name for name in names if names.count(name) > 1}:
        alike = [i for i, other in enumerate(names) if other == name]
        common = set.intersection(*(set(experiments[i].overrides) for i in alike))
        for i in alike:
            names[i] = " ".join([name, *(o for o in experiments[i].overrides if o not in common and o not in name)])
    return names


def load_study(name: str) -> dict:
    """`{name, caption, seeds, base, experiments}` of conf/study/NAME.yaml."""
    files = {found.stem: found for found in (ROOT / "conf" / "study").glob("*.yaml")}
    if name not in files:
        raise ValueError(f"study={name}: no such file in conf/study/; there is {', '.join(sorted(files))}")
    try:
        found = OmegaConf.to_container(OmegaConf.load(files[name]))
    except (yaml.YAMLError, OSError, OmegaConfBaseException) as error:
        raise ValueError(f"study={name}: {files[name]} is no YAML of a study: {first_lines(error)}") from error
    return checked_study(found, f"study={name}")


NOT_A_STUDYS = re.compile(r"[+~]*(paths|out|hydra|tracking|evaluation\.run_generated_code)\b")
"""What a study, which somebody else may have written, leaves to whoever runs it."""


def checked_study(study, key: str) -> dict:
    """The study, unchanged; ValueError for what is no study, or sets keys that are left to whoever runs it."""
    texts = isinstance(study, dict) and all(isinstance(study.get(name), str) for name in ("name", "caption"))
    lists = texts and all(isinstance(study.get(name), list) for name in ("base", "experiments"))
    if not lists or not all(isinstance(line, str) for line in (*study["base"], *study["experiments"])):
        raise ValueError(f"{key}: a study has name and caption (texts), base and experiments (lists of overrides)")
    seeds = study.get("seeds", [])
    if not study["experiments"] or not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{key}: give at least one experiment, and seeds, if any, as a list of whole numbers: [0, 1]")
    for line in [*study["base"], *shlex.split(" ".join(study["experiments"]))]:
        if NOT_A_STUDYS.match(line):
            raise ValueError(f"{key}: sets {line!r}, which is for whoever runs the study: give it on the command line")
    return study


def study_experiments(study: dict, overrides: list[str] | tuple[str, ...] = ()) -> list[Experiment]:
    """Every experiment of a study: its own overrides over the study's base, the caller's over both; under each of the study's
    seeds, but once where its artefacts are the same without them.
    The 16-bit models are added as `compared` has it."""
    found: list[Experiment] = []
    for line in study["experiments"]:
        own = [*study["base"], *shlex.split(line)]
        plain = experiment([*own, *overrides])
        drawn = [experiment([*own, f"seed={seed}", *overrides]) for seed in study.get("seeds", [])]
        different = {member.artefacts["evaluation"].key: member for member in drawn}
        found += different.values() if different.keys() - {plain.artefacts["evaluation"].key} else [plain]
    return compared(found)


def compared(experiments: list[Experiment]) -> list[Experiment]:
    """The experiments of one table: duplicates dropped, and in front the 16-bit models that they are measured against, where
    these are not among them already."""
    once: dict[tuple, Experiment] = {}
    for member in experiments:
        once.setdefault(tuple(item.key for item in member.artefacts.values()), member)
    found = list(once.values())
    known = {member.artefacts["evaluation"].key for member in found}
    for member in list(found):
        key = artefact("evaluation", reference(member.config)).key
        if key not in known:
            own = [o for o in member.overrides if not o.startswith(("quantization", "allocation", "pruning", "experiment"))]
            found.insert(0, experiment([*own, "quantization=none", "pruning=none"]))
            known.add(key)
    return found


REPORT_VERSION = 6


def report_artefact(name: str, caption: str, experiments: list[Experiment]) -> Artefact:
    """The report over many experiments: one folder with the table, the figures and the page. ValueError where two of them
    would have one name."""
    inputs: dict[str, Artefact] = {}
    runs = []
    names = run_names(experiments)
    if twice := [run_name for run_name in dict.fromkeys(names) if names.count(run_name) > 1]:
        raise ValueError(
            f"report {name}: several runs that differ would be called {twice[0]!r}, for what they differ in is in no name; "
            "ask for them one by one, in reports of their own"
        )
    for member, run_name in zip(experiments, names, strict=True):
        stages = dict(member.artefacts)
        stages["model"] = artefact("model", member.config)
        stages["corpus"] = artefact("corpus", member.config)
        if "allocation" in stages and reads_statistics(member.config["allocation"]):
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
