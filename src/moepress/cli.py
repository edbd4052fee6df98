"""The `moepress` command: a Hydra app that runs one experiment, or a study, as a Snakemake DAG.

moepress quantization=gptq allocation=uniform allocation.bits=3
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from moepress import execution
from moepress import plan as planning
from moepress.config import ROOT, resolve


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def app(config) -> None:
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    try:
        if config.out is not None and settings.mode == RunMode.MULTIRUN:
            raise ValueError(f"out={config.out}: a sweep has many checkpoints; give out= to a single experiment")
        plan = planning.for_overrides(overrides)
        code = execution.run(plan, overrides)
        if not code and config.out is not None:
            print(f"a copy to publish: {execution.publish(plan, config.out)}", file=sys.stderr)
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    if code:
        sys.exit(code)
    if any(override.startswith("study=") for override in overrides):
        print((Path(plan.report) / "summary.md").read_text(encoding="utf-8"))
    elif settings.mode == RunMode.RUN:
        print_row(Path(plan.report))
    print(plan.report)


def print_row(report: Path) -> None:
    """The experiment's row of runs.csv, one value a line."""
    row = {name: value for name, value in execution.rows(report)[-1].items() if name != "keys"}
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:{width}}  {'' if value is None else value}")


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        from moepress import forecast

        return forecast.main(sys.argv[2:])
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        try:  # before Hydra composes, whose own message says less
            resolve([argument for argument in sys.argv[1:] if not argument.startswith("study=")])
        except ValueError as error:
            sys.exit(f"moepress: {error}")
    app()


if __name__ == "__main__":
    main()
