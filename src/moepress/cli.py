"""The `moepress` command: a Hydra app that runs one experiment, or a study, as a Snakemake DAG.

moepress quantization=gptq allocation=uniform allocation.bits=3
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from moepress import plan as planning
from moepress.config import ROOT, resolve


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def app(_) -> None:
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    try:
        plan = planning.for_overrides(overrides)
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    code = run(plan, overrides)
    if code:
        sys.exit(code)
    if any(override.startswith("study=") for override in overrides):
        print((Path(plan.report) / "summary.md").read_text(encoding="utf-8"))
    elif settings.mode == RunMode.RUN:
        print_row(Path(plan.report))
    print(plan.report)


def run(plan: planning.Plan, overrides: list[str]) -> int:
    """Hand the plan to Snakemake, which runs what is not computed yet; its exit code."""
    if all(Path(target).exists() for target in plan.targets):
        print("everything is computed already", file=sys.stderr)
        return 0
    cores = resolve([o for o in overrides if not o.startswith("study=")])["cores"] or os.cpu_count()
    experiments = json.dumps([" ".join(map(shlex.quote, overrides))])
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
    command += ["--config", f"experiments={experiments}", "--quiet", "host", "rules", "reason"]
    snakemake = subprocess.Popen(command)
    while True:
        try:
            return snakemake.wait()
        except KeyboardInterrupt:  # Snakemake got it too: it ends its jobs and unlocks the folder before it goes
            print("moepress: stopping; the same command goes on from what is whole", file=sys.stderr)


def print_row(report: Path) -> None:
    """The experiment's row of runs.csv, one value a line."""
    with (report / "runs.csv").open(newline="", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[-1]
    row.pop("keys", None)
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:{width}}  {value}")


def main() -> None:
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        try:  # before Hydra composes, whose own message says less
            resolve([argument for argument in sys.argv[1:] if not argument.startswith("study=")])
        except ValueError as error:
            sys.exit(f"moepress: {error}")
    app()


if __name__ == "__main__":
    main()
