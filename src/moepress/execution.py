"""A plan run by Snakemake, and what the run left: one way for the `moepress` command and for `moepress.compress`."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from moepress.artefacts import read_json
from moepress.config import ROOT, values
from moepress.plan import Plan


def run(plan: Plan, overrides: list[str]) -> int:
    """Hand the plan to Snakemake, which runs what is not computed yet; its exit code."""
    if all(Path(target).exists() for target in plan.targets):
        print("everything is computed already", file=sys.stderr)
        return 0
    cores = values([o for o in overrides if not o.startswith("study=")])["cores"] or os.cpu_count()
    own = [o for o in overrides if not o.startswith("out=")]  # of the command, not of the DAG
    experiments = json.dumps([" ".join(map(shlex.quote, own))])
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
    command += ["--config", f"experiments={experiments}", "--quiet", "host", "rules", "reason"]
    snakemake = subprocess.Popen(command)
    while True:
        try:
            return snakemake.wait()
        except KeyboardInterrupt:  # Snakemake got it too: it ends its jobs and unlocks the folder before it goes
            print("moepress: stopping; the same command goes on from what is whole", file=sys.stderr)


def failure(plan: Plan) -> str:
    """What a run that failed says: the newest log of a stage that is not there, and that log's last line."""
    results = Path(plan.results)
    missing = [results / "logs" / f"{folder}.log" for folder in plan.artefacts if not (results / folder).exists()]
    logs = sorted((log for log in missing if log.is_file()), key=lambda log: log.stat().st_mtime)
    if not logs:
        return "Snakemake failed before any stage began; its log is the newest in .snakemake/log/"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["(nothing)"]
    return f"{lines[-1].removeprefix('moepress: ')} (the log: {logs[-1]})"


def last_run(plan: Plan) -> dict[str, Path]:
    """Stage -> folder of the experiment that was asked for: the last in the report."""
    report = plan.artefacts[str(Path(plan.report).relative_to(plan.results))]
    return {stage: Path(plan.results) / folder for stage, folder in report.config["runs"][-1]["artefacts"].items()}


def rows(report: Path) -> list[dict]:
    """The rows of a report's runs.csv, numbers as such and None for what is not known."""
    with (report / "runs.csv").open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def publish(plan: Plan, out: str | Path) -> Path:
    """A copy of the run's checkpoint in the folder `out`, ready to publish, with what was measured of it.

    Raises ValueError naming an `out` that holds something else.
    """
    from moepress.export import export

    pruned = "pruning" in last_run(plan)  # what was measured then is not the checkpoint's own
    return export(last_run(plan)["quantization"], Path(out).expanduser(), None if pruned else Path(plan.report))


def policy(plan: Plan) -> dict | None:
    """The pruning policy that the run's model is measured under."""
    folder = last_run(plan).get("pruning")
    return read_json(folder / "policy.json") if folder else None
