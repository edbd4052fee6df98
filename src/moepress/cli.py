"""The `moepress` command: a Hydra app that runs an experiment, a study or a sweep as one Snakemake DAG, and what reads results.

moepress quantization=gptq allocation=uniform allocation.bits=3
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from moepress import composing, execution, integrity, studies
from moepress.artefacts import of_the_machine
from moepress.commands import results
from moepress.composing import ALONE, ROOT, groups, readable_error, without_value
from moepress.config import resolve
from moepress.plan import Plan
from moepress.schema.values import nearest
from moepress.sweeps import MemberFailed

COMMANDS = {
    "plan": "moepress.commands.plan",
    "results": "moepress.commands.results",
    "compare": "moepress.commands.compare",
    "show": "moepress.commands.show",
    "clean": "moepress.commands.clean",
    "verify": "moepress.commands.verify",
    "latency": "moepress.commands.latency",
    "sync": "moepress.commands.sync",
    "dashboard": "moepress.commands.dashboard",
}


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def app(config) -> None:
    """One experiment; of a sweep under another launcher than ours, a member."""
    hydras = HydraConfig.get()
    try:
        if config.out is not None and hydras.mode == RunMode.MULTIRUN:
            raise ValueError(f"out={config.out}: a sweep has many checkpoints; give out= to a single experiment")
        compute(list(hydras.overrides.task), execution.settings_of(hydras.launcher), config.out, hydras.mode)
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    except OSError as error:  # Hydra would print all overrides above what main says of it
        if (why := of_the_machine(error)) is None:
            raise
        sys.exit(f"moepress: {why}")


def compute(overrides: list[str], settings: execution.Settings, out: str | None = None, mode: RunMode | None = RunMode.RUN):
    """Run an experiment, or with `study=NAME` among the overrides a study, and say what came of it."""
    plan, began = execution.planned(overrides, settings), time.time()
    if out is not None:
        plan = execution.with_checkpoint(plan)
    if execution.run(plan, [overrides], settings):
        print(execution.failures(plan, began), file=sys.stderr)
        sys.exit(1)
    if not execution.is_done(plan):
        print(execution.no_run(plan), file=sys.stderr)
        return
    if out is not None:
        print(f"a copy to publish: {execution.publish(plan, out)}", file=sys.stderr)
    tell(plan, overrides, mode)


def tell(plan: Plan, overrides: list[str], mode: RunMode | None) -> None:
    """What came of it, and as the last line the report's folder."""
    if any(override.startswith("study=") for override in overrides):
        report = Path(plan.report)
        integrity.check([(report, True)], report.parent.parent)
        print((report / "summary.md").read_text(encoding="utf-8"))
    elif mode == RunMode.RUN:
        print(results.sideways(execution.rows(Path(plan.report))))
        print(f"every column: {plan.report}/runs.csv; the page: {plan.report}/index.html")
    print(plan.report)


def main() -> None:
    """The `moepress` command. An error that is no bug ends the process with one line and exit code 1; with HYDRA_FULL_ERROR=1
    in the environment it is raised with its trace."""
    asked_for_traces = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through to here, instead of printing them with their traces
    arguments = sys.argv[1:]
    try:
        run(arguments)
    except MemberFailed:
        sys.exit(1)  # the sweep has told of it
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        if asked_for_traces == "1":
            raise
        if isinstance(error, HydraException | OmegaConfBaseException):
            error = readable_error(error, [a for a in arguments if not a.startswith("-")])
        sys.exit(f"moepress: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `moepress results | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif asked_for_traces == "1" or (why := of_the_machine(error)) is None:
            raise
        else:
            sys.exit(f"moepress: {why}")
    finally:
        os.environ["HYDRA_FULL_ERROR"] = asked_for_traces or "0"


TAKE_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn")
TAKE_A_WORD += ("--config-dir", "-cd", "--experimental-rerun")
"""Hydra's options that do."""


def refuse_words(arguments: list[str]) -> None:
    """ValueError for what is neither an option, nor KEY=VALUE, nor a command in its place."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if "=" in word or word.startswith(("-", "~")) or before in TAKE_A_WORD:
            continue
        if word in COMMANDS:
            rest = " ".join(other for other in arguments if other != word)
            raise ValueError(f"{word!r} is a command, which comes first: moepress {word} {rest}")
        if "." in word or word in (*ALONE, *groups()):
            raise ValueError(without_value(word))
        raise ValueError(
            f"{word!r}: no such command{nearest(word, COMMANDS)}; there is {', '.join(COMMANDS)}; without one, "
            "`moepress KEY=VALUE ...` runs an experiment, and a key needs its `=`"
        )


def check_study(arguments: list[str]) -> None:
    """ValueError for a study that there is not, or beside an experiment, which each line of it is by itself."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name, chosen = given.get("study"), given.get("experiment")
    if name is None or "--multirun" in arguments or "-m" in arguments:
        return
    study = studies.load_study(name)
    if chosen is not None and any(
        "quantization=" in line or "allocation=" in line for line in (*study["base"], *study["experiments"])
    ):
        raise ValueError(
            f"experiment={chosen} beside study={name}: its experiments choose for themselves; leave one of the two out"
        )


def run(arguments: list[str]) -> None:
    """One of COMMANDS, a study, or what Hydra makes of the arguments: an experiment, a sweep, its own --help or --cfg."""
    if arguments and arguments[0] in COMMANDS:
        import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        return
    refuse_words(arguments)
    check_study(arguments)
    if any(argument.startswith("-") for argument in arguments):
        app()
    elif any(argument.startswith("study=") for argument in arguments):  # its experiments may choose the groups of other keys
        launcher = composing.launcher([a for a in arguments if a.startswith("hydra")])
        compute([a for a in arguments if not a.startswith("hydra")], execution.settings_of(launcher))
    else:
        resolve(arguments)  # before Hydra composes, whose own message says less
        app()
