"""What Snakemake is to build: the artefacts of the experiments that were asked for, their task files, the targets."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from moepress import estimate, forecast, tracking
from moepress.artefacts import write_tasks
from moepress.dag import Artefact, everything, is_reference, run_label
from moepress.machine import uses_gpu
from moepress.models import dense, limits
from moepress.models.folders import read_config
from moepress.quantization.budget import Prediction
from moepress.studies import Experiment, compared, experiment, load_study, report_artefact, study_experiments

LARGE_HIDDEN_SIZE = 512
LEAST_MEMORY_MB = 2000
"""Of a job: torch, transformers and the text."""
SOME_MEMORY_MB = 16000
"""Where nothing can be predicted: a hub model whose config.json is not here yet."""


@dataclass(frozen=True)
class Plan:
    """artefacts: folder -> Artefact of everything needed. report: the folder that joins it. targets: for `rule all`.
    tracking: what the mirror is asked for, as JSON. large: ids of the models whose stages take all cores. cores: asked for,
    None for all. configs: folder -> the whole configuration of the first experiment that needs it."""

    results: str
    artefacts: dict[str, Artefact]
    report: str
    targets: list[str]
    gpus: int
    tracking: str
    large: frozenset[str]
    cores: int | None
    configs: dict[str, dict] = field(repr=False)

    @property
    def shell_prefix(self) -> str:
        """Fails a job where its stage fails, whatever `tee` says; and lets `python` be this one where the shell would find
        another: an environment that is not activated."""
        here = Path(sys.executable)
        is_found = Path(shutil.which("python") or "") == here.with_name("python")
        return "set -euo pipefail; " + ("" if is_found else f"export PATH={shlex.quote(str(here.parent))}:$PATH; ")

    def task(self, stage: str) -> str:
        """The task file of a stage's job. No input of it: it is written wherever the plan is made, so also where a job of a
        cluster reads the Snakefile, and never fetched; a change is another key."""
        return f"{self.results}/tasks/{stage}/{{id}}.yaml"

    def threads(self, stage: str, cores: int):
        """Snakemake's threads of a job: one where the model is small, so that several run side by side; all the cores where
        it is large. A job's bytes may depend on it, so it depends on nothing else."""

        def wanted(wildcards):
            item = self.artefacts.get(f"{stage}/{wildcards.id}")
            models = [found for found in everything([item]).values() if found.stage == "model"] if item else []
            return cores if any(found.id in self.large for found in models) else 1

        return wanted

    def memory(self, stage: str):
        """Snakemake's `mem_mb` of a job: 1.5 times what `moepress plan` predicts, times the number of the attempt. Clusters are
        asked for it; on this machine it counts only where `--resources mem_mb=` says how much there is."""

        @cache
        def at_first(folder: str) -> int:
            return memory_mb(stage, self.configs[folder]) if folder in self.configs else SOME_MEMORY_MB

        return lambda wildcards, attempt: attempt * at_first(f"{stage}/{wildcards.id}")

    def gpus_of_model(self, wildcards) -> int:
        """Snakemake's `gpu` of a job of the stage model: a dense model is carved, and distilled, on the device; the small one
        is trained on the CPU, and others are only read."""
        config = self.configs.get(f"model/{wildcards.id}")
        return self.gpus if config and config["model"]["kind"] == "carved" else 0

    def upstream(self, stage: str):
        """Snakemake input function: the folders that a stage's job reads; none for an artefact of another plan."""
        from snakemake.io import ancient

        def folders(wildcards):
            item = self.artefacts.get(f"{stage}/{wildcards.id}")
            return [ancient(f"{self.results}/{found.folder}") for found in item.reads.values()] if item else []

        return folders


def memory_mb(stage: str, config: dict) -> int:
    """MiB to ask for a job of a stage; for a model whose outline cannot be read yet, SOME_MEMORY_MB. Without network."""
    try:
        model, packed = forecast.read_model(config["model"], local=True), 0
        if config["quantization"]["method"] != "none":
            packed = forecast.asked_size(Prediction(model, config["quantization"]), config["allocation"]).on_cpu
    except (OSError, ValueError):
        return SOME_MEMORY_MB
    known = estimate.memory(model, config, packed, "cpu", limits.memory_limit())
    is_16bit = stage == "evaluation" and config["quantization"]["method"] == "none"
    needed = known.get("evaluation at 16 bits" if is_16bit else stage, 0)
    if stage == "statistics_block":
        needed = known["statistics"]
    if stage == "model" and config["model"]["kind"] in ("tiny", "carved"):  # a step's activations; weights, gradients, momenta
        needed = (4 << 30) + 20 * model.num_weights
    return max(LEAST_MEMORY_MB, int(1.5 * needed / 2**20))


def all_cores(workflow) -> int:
    """Threads of a job that takes the whole machine, or all that Slurm gave the job that we are in; 1 where Snakemake was told
    no number (`--unlock`, `--report`)."""
    from snakemake.exceptions import WorkflowError

    try:
        return min(workflow.cores or 1, int(os.environ.get("SLURM_CPUS_PER_TASK", workflow.cores or 1)))
    except WorkflowError:
        return 1


def make(name: str, caption: str, experiments: list[Experiment]) -> Plan:
    """The plan of some experiments, with their task files written."""
    first = experiments[0].config
    results = Path(first["paths"]["results"]).expanduser()
    report = report_artefact(name, caption, experiments)
    configs: dict[str, dict] = {}
    needed = everything([report])
    rows = [(member, row["artefacts"].values()) for member, row in zip(experiments, report.config["runs"], strict=True)]
    for member, own in rows:  # a member's own artefacts before what others need of them
        configs |= {folder: member.config for folder in own if folder not in configs}
    for member, own in rows:
        for folder in everything([needed[folder] for folder in own]):
            configs.setdefault(folder, member.config)
    configs.setdefault(report.folder, first)
    artefacts = write_tasks([report], configs, results)
    targets = [f"{results}/{report.folder}"]
    mode, settings = first["tracking"]["mode"], tracking.settings_of(first["tracking"])
    if mode != "disabled":
        targets.append(f"{results}/tracking/{mode}/{report.id}.json")
        tracking.drop_stale(Path(targets[-1]), settings)
    gpus = int(uses_gpu(first["device"]))
    models = {folder: configs[folder]["model"] for folder, item in artefacts.items() if item.stage == "model"}
    large = frozenset(artefacts[folder].id for folder, model in models.items() if is_large(model))
    return Plan(str(results), artefacts, targets[0], targets, gpus, json.dumps(settings), large, first["cores"], configs)


def is_large(model: dict) -> bool:
    """Whether a model's matrices are worth more than one thread each. model: the configuration group."""
    if model["kind"] == "hub":
        return True
    if model["kind"] == "carved":
        return dense.read_config(model)["hidden_size"] >= LARGE_HIDDEN_SIZE
    config = model["architecture"] if model["kind"] == "tiny" else read_config(Path(model["path"]), "model.path")
    return config.get("hidden_size", 0) >= LARGE_HIDDEN_SIZE


def for_overrides(overrides: list[str]) -> Plan:
    return make(*asked(overrides))


def asked(overrides: list[str]) -> tuple[str, str, list[Experiment]]:
    """Name, caption and rows of the report that overrides ask for: one experiment beside its 16-bit model, or with `study=NAME`
    among them that study's experiments. Raises ValueError for values that cannot be."""
    refuse_of_hydra(overrides)
    names = [o.partition("=")[2] for o in overrides if o.startswith("study=")]
    rest = [o for o in overrides if not o.startswith("study=")]
    if names:
        refuse_out(rest, "a study has many checkpoints; give out= to a single experiment")
        return of_study(names[-1], rest)
    member = experiment(rest)
    if member.config["out"] is not None and member.config["quantization"]["method"] == "none":
        raise ValueError(f"out={member.config['out']}: quantization=none makes no checkpoint; there is nothing to copy")
    return joined([member])


def for_experiments(members: list[Experiment]) -> Plan:
    return make(*joined(members))


def joined(members: list[Experiment]) -> tuple[str, str, list[Experiment]]:
    """Name, caption and rows of one report over experiments: each once, beside their 16-bit models; a single one's is named
    as it is."""
    members = compared(members)
    own = [member for member in members if not is_reference(member.config)] or members
    if len(own) > 1:
        return "experiments", f"{len(own)} experiments.", members
    label = run_label(own[0].config)
    return label, f"{label} beside the 16-bit model.", members


def refuse_out(overrides: list[str], why: str) -> None:
    """ValueError for an `out=` that would otherwise be ignored in silence."""
    for override in overrides:
        if override.startswith("out=") and override != "out=null":
            raise ValueError(f"{override}: {why}")


def refuse_of_hydra(overrides: list[str]) -> None:
    """ValueError for a `hydra.KEY=` that would otherwise be ignored in silence: only the `moepress` command reads these."""
    for override in overrides:
        if override.startswith("hydra"):
            raise ValueError(f"{override}: of the `moepress` command alone, moepress KEY=VALUE ... {override}")


def of_study(name: str, overrides: list[str]) -> tuple[str, str, list[Experiment]]:
    study = load_study(name)
    return study["name"], study["caption"], study_experiments(study, overrides)


def from_snakemake(config: dict) -> Plan:
    """The plan for Snakemake's `--config`: `experiments` (a list of override strings), or `study` (default: default) with
    `overrides` (a string) for all its members."""
    known = {"experiments", "study", "overrides"}
    if unknown := set(config) - known:
        raise ValueError(f"--config {sorted(unknown)[0]}=: known are {', '.join(sorted(known))}")
    overrides = shlex.split(str(config.get("overrides", "")))
    lines = config.get("experiments", [])
    lines = [lines] if isinstance(lines, str) else list(lines)
    why = "snakemake makes the results; the `moepress` command and moepress.compress copy the checkpoint"
    everywhere = [*overrides, *(o for line in lines for o in shlex.split(line))]
    refuse_out(everywhere, why)
    refuse_of_hydra(everywhere)
    if "experiments" in config:
        if len(lines) == 1:
            return for_overrides([*shlex.split(lines[0]), *overrides])
        return for_experiments([experiment([*shlex.split(line), *overrides]) for line in lines])
    return make(*of_study(config.get("study", "default"), overrides))
