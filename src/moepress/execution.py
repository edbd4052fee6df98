"""A plan run by Snakemake, and what the run left: one way for the `moepress` command and for `moepress.compress`."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from moepress import integrity, locks
from moepress.artefacts import read_json, write_if_changed
from moepress.composing import ROOT
from moepress.dag import Artefact
from moepress.forecast import check_memory
from moepress.machine import check_gpu, check_timing
from moepress.plan import Plan, asked, make
from moepress.studies import Experiment


@dataclass(frozen=True)
class Settings:
    """How Snakemake runs: conf/hydra/launcher/snakemake.yaml. storage: a place in a bucket, `s3://BUCKET/PREFIX`. arguments:
    further ones of its command line."""

    executor: str | None = None
    cores: int | None = None
    jobs: int | None = None
    profile: str | None = None
    storage: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.executor in (None, "local") and self.profile in (None, "default")

    def options(self, cores: int | None) -> list[str]:
        """Options of Snakemake's command line. cores: what the configuration asks for."""
        cores = self.cores or cores or (os.cpu_count() if self.is_local else None)
        ours = ROOT / "workflow" / "profiles" / (self.profile or "")
        profile = str(ours) if self.profile and ours.is_dir() else self.profile
        given = {"cores": cores, "executor": self.executor, "jobs": self.jobs, "workflow-profile": profile}
        named = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
        bucket = ["--default-storage-provider", "s3", "--default-storage-prefix", self.storage] if self.storage else []
        # A stage that runs here says itself what Snakemake would; elsewhere only Snakemake knows why a job was refused.
        quiet = ["--quiet", "host", "reason", *(["rules"] if self.is_local else [])]
        return [*named, *bucket, "--keep-going", *map(str, self.arguments), *quiet]


def settings_of(launcher) -> Settings:
    """Those of Hydra's configuration node for the launcher; the defaults where another launcher than ours is chosen."""
    if not str(launcher.get("_target_")).endswith("SnakemakeLauncher"):
        return Settings()
    return Settings(**{name: value for name, value in OmegaConf.to_container(launcher).items() if name != "_target_"})


def planned(overrides: list[str], settings: Settings) -> Plan:
    """The plan of an experiment, or with `study=NAME` of a study; refused before anything is written where it cannot come to
    a good end."""
    name, caption, members = asked(overrides)
    check_machine(members, settings)
    if (out := members[-1].config["out"]) is not None:
        from moepress.export import check_free  # imports pandas, as a report does

        check_free(Path(out).expanduser(), members[-1].artefacts["quantization"].key)
    return make(name, caption, members)


def check_machine(members: Iterable[Experiment], settings: Settings) -> None:
    """ValueError for what the machine that the jobs run on cannot do, as far as that is known here."""
    for member in members:
        config = member.config
        if settings.is_local:
            check_gpu(config["device"])
            if "quantization" in member.missing and not settings.storage:  # which may have it
                check_memory(config)
        elif "latency" in member.missing:
            check_timing(config["device"], config["latency"]["hardware"])


def with_checkpoint(plan: Plan) -> Plan:
    """The plan with the run's checkpoint and policy among its targets, so that they are computed again where they were deleted
    after the report was made."""
    run = runs(plan)[-1]["artefacts"]
    wanted = [run.get("quantization", run["model"]), *([run["pruning"]] if "pruning" in run else [])]
    return replace(plan, targets=[*plan.targets, *(f"{plan.results}/{folder}" for folder in wanted)])


def is_done(plan: Plan) -> bool:
    return all(Path(target).exists() for target in plan.targets)


def no_run(plan: Plan) -> str:
    """What is said where Snakemake succeeded and the plan is not done."""
    return f"moepress: no {plan.report}: hydra.launcher.arguments asked for something else than a run"


def run(plan: Plan, experiments: list[list[str]], settings: Settings | None = None) -> int:
    """Hand the plan to Snakemake, which runs what is not computed yet; its exit code.

    experiments: the overrides of each one, from which Snakemake makes the same plan. Raises KeyboardInterrupt where that
    stopped it.
    """
    settings = settings or Settings()
    if not is_done(plan) or settings.storage:  # which may lack what is here
        with locks.working_folder() as lock:
            if not is_done(plan) or settings.storage:  # by the run that this one waited for
                return _run(plan, experiments, settings, lock)
    print("everything is computed already", file=sys.stderr)
    return 0


def _run(plan: Plan, experiments: list[list[str]], settings: Settings, lock: int | None) -> int:
    # A file, as a command line has no room for a large sweep. `out` is of the command, not of the DAG.
    lines = [" ".join(shlex.quote(o) for o in overrides if not o.startswith("out=")) for overrides in experiments]
    asked_for = Path(plan.results) / "tasks" / "asked" / f"{Path(plan.report).name}.json"
    write_if_changed(asked_for, json.dumps({"experiments": lines}, indent=1, ensure_ascii=False) + "\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", str(asked_for)]
    command += settings.options(plan.cores)
    command += ["--", *(["here"] if settings.storage else plan.targets)]
    is_stopped = False
    with _terminated_as_interrupted(), locks.snakemake(command, lock) as snakemake:
        while True:
            try:
                code = snakemake.wait(GRACE if is_stopped else None)
                break
            except KeyboardInterrupt:  # Snakemake got it too: it ends its jobs and unlocks the folder before it goes
                is_stopped = True
                print("moepress: stopping", file=sys.stderr)
            except subprocess.TimeoutExpired:
                _stop(snakemake)
    if is_stopped:
        print("moepress: stopped; the same command goes on from what is whole", file=sys.stderr)
        raise KeyboardInterrupt
    return code


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM (`kill`, `timeout`, a batch system) is taken as a Ctrl-C, in the main thread, which alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


GRACE = 5.0
"""Seconds that Snakemake has to stop by itself."""


def _stop(snakemake: subprocess.Popen) -> None:
    """What a Ctrl-C does, for a Snakemake that did not hear it (it was meant for this process alone, or lost in what Snakemake
    was just at): its stages are interrupted, and it starts no more."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(snakemake.pid).children(recursive=True)
        snakemake.send_signal(signal.SIGTERM)  # it ends when its jobs have; a second SIGINT would leave the folder locked
        for process in below:
            with suppress(psutil.NoSuchProcess):
                if "moepress.stages" in process.cmdline():
                    process.send_signal(signal.SIGINT)


def missing(plan: Plan) -> list[str]:
    """Folders that must still be made before the targets are there, targets included; an input is not needed any more once
    everything that reads it exists."""
    results, found = Path(plan.results), {}

    def visit(item: Artefact) -> None:
        if item.folder not in found and not (results / item.folder).exists():
            found[item.folder] = None
            for upstream in item.reads.values():
                visit(upstream)

    for target in plan.targets:
        if item := plan.artefacts.get(str(Path(target).relative_to(results))):  # else W&B's note
            visit(item)
    return list(found)


def failures(plan: Plan, since: float) -> str:
    """The last words of a run that failed: each artefact that failed and why, how many more are missing, and how to go on.

    since: when the run started (seconds of the epoch); older logs are of other runs.
    """
    results, absent = Path(plan.results), missing(plan)
    ready = [f for f in absent if not any(item.folder in absent for item in plan.artefacts[f].reads.values())]
    failed = [f for f in ready if _logs(results, [f], since)] or ready  # the others were not begun
    lines = [
        f"moepress: {len(failed)} of {len(plan.artefacts)} artefacts failed, {len(absent) - len(failed)} more are missing, "
    ]
    lines[0] += "which wait for these or were not begun"
    lines += [f"moepress:   {folder}: {failure(results, [folder], since)}" for folder in failed]
    return "\n".join([*lines, "moepress: once that is mended, the same command goes on from what is whole"])


def _logs(results: Path, folders: Iterable[str | Path], since: float) -> list[Path]:
    """Logs of those artefacts that are not there, the newest last."""
    named = [results / "logs" / f"{folder}.log" for folder in folders if not (results / folder).exists()]
    found = [(log.stat().st_mtime, log) for log in named if log.is_file()]
    return [log for written, log in sorted(found) if written >= since]


def failure(results: Path, folders: Iterable[str | Path], since: float = 0.0) -> str:
    """Why a run failed: the last line of the newest log of an artefact that is not there."""
    logs = _logs(results, folders, since)
    if not logs:
        return "Snakemake failed before any stage began; its log is the newest in .snakemake/log/"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not lines:
        return (
            f"ended before its first word; what Snakemake says of its job is above and in .snakemake/log/ ({logs[-1]} is empty)"
        )
    told = [line for line in lines if line.startswith("moepress: ") and not line.endswith("waiting for it")]
    last = told[-1].removeprefix("moepress: ") if told else lines[-1]
    if not told and not any(line.startswith("Traceback (most recent call last)") for line in lines):
        last = f"killed, for want of memory if nobody did it; the last that it said was: {last}"
    return f"{last} (the log: {logs[-1]})"


def last_run(plan: Plan) -> dict[str, Path]:
    """Stage -> folder of the experiment that was asked for: the last in the report."""
    return {stage: Path(plan.results) / folder for stage, folder in runs(plan)[-1]["artefacts"].items()}


def runs(plan: Plan) -> list[dict]:
    """What the report lists: an entry for each of its rows."""
    return plan.artefacts[str(Path(plan.report).relative_to(plan.results))].config["runs"]


def rows(report: Path) -> list[dict]:
    """The rows of a report's runs.csv, numbers as such and None for what is not known. ValueError for a damaged report."""
    integrity.check([(report, True)], report.parent.parent)
    with (report / "runs.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def value(text: str):
    """A cell of a CSV file: a number where it is one, None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def publish(plan: Plan, out: str | Path) -> Path:
    """A copy of the run's checkpoint in the folder `out`, ready to publish, with what was measured of it.

    Raises ValueError naming an `out` that holds something else or cannot be written.
    """
    from moepress.export import export

    run = last_run(plan)
    pruned = "pruning" in run  # what was measured then is not the checkpoint's own
    try:
        return export(run["quantization"], Path(out).expanduser(), None if pruned else Path(plan.report))
    except OSError as error:
        raise ValueError(f"out={out}: cannot be written ({error}); give another folder; what is computed is kept") from error


def policy(plan: Plan) -> dict | None:
    """The pruning policy that the run's model is measured under."""
    folder = last_run(plan).get("pruning")
    return read_json(folder / "policy.json") if folder else None
