"""A sweep: what Hydra's sweeper asks for, as one DAG and one report, and the objective of each member as the answer.

Sweepers that search (Optuna's) ask again and again; each report then holds all members so far.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from moepress import dag, execution, plan, studies
from moepress.commands import results as results_table
from moepress.execution import Settings
from moepress.plan import Plan

Answer = float | tuple[float, ...] | None
"""What a member gives its sweeper: the column that `objective` names, several, or nothing where it is null."""


class MemberFailed(RuntimeError):
    """A member of a sweep that came to nothing: the overrides that not all members share, and why."""


@dataclass
class Sweep:
    """settings: how Snakemake runs. members: those that succeeded so far."""

    settings: Settings
    members: list[studies.Experiment] = field(default_factory=list)

    def launch(self, jobs: list[list[str]]) -> list[JobReturn]:
        """Run a batch, print the report over all members so far, and return each job's objective, or its failure.

        jobs: overrides of each member. Raises ValueError where the whole sweep is impossible, KeyboardInterrupt if stopped.
        """
        common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        names = [" ".join(override for override in overrides if override not in common) for overrides in jobs]
        failures: dict[int, str] = {}
        asked: dict[int, studies.Experiment] = {}
        for number, overrides in enumerate(jobs):
            refuse_whole(overrides)
            try:
                member = studies.experiment(overrides)
                execution.check_machine([member], self.settings)
                asked[number] = member
            except ValueError as error:
                failures[number] = str(error)
                print(f"moepress: refused: {names[number]}: {error}", file=sys.stderr)
        answers: dict[int, Answer] = {}
        done = self.compute(asked, failures) if asked else None
        for number in asked.keys() - failures.keys():
            if done is None:
                break
            try:
                answers[number] = objective(done, asked[number])
            except ValueError as error:
                failures[number] = str(error)
        if failures:
            rest = "; the others are whole" if answers else ""
            print(f"moepress: {len(failures)} of {len(jobs)} members failed{rest}:", file=sys.stderr)
        for number in sorted(failures):
            print(f"moepress: {names[number]}: {failures[number]}", file=sys.stderr)
        returns = []
        for number, overrides in enumerate(jobs):
            failed = MemberFailed(f"{names[number]}: {failures[number]}") if number in failures else None
            returns.append(returned(overrides, asked.get(number), answers.get(number), failed))
        return returns

    def compute(self, asked: dict[int, studies.Experiment], failures: dict[int, str]) -> Plan | None:
        """Run what is asked, note what failed, and print the report over all that is whole. None: it was no run that Snakemake
        was told to do."""
        done, code = self.run(list(asked.values()))
        if code == 0 and not execution.is_done(done):
            print(execution.no_run(done), file=sys.stderr)
            return None
        whole = {number: member for number, member in asked.items() if is_whole(member)}
        self.members = [*self.members, *whole.values()]
        for number in asked.keys() - whole.keys():
            needed = dag.everything([*asked[number].artefacts.values()])
            failures[number] = execution.failure(asked[number].results, needed)
        if whole and failures and not Path(done.report).exists():  # its plan has those that failed, so make one without
            done, _ = self.run([])
        if whole and Path(done.report).exists():
            print(results_table.table(execution.rows(Path(done.report))))
            print(done.report)
        return done

    def run(self, new: list[studies.Experiment]) -> tuple[Plan, int]:
        """Snakemake over what succeeded before and what is new, and its exit code."""
        members = [*self.members, *new]
        planned = plan.for_experiments(members)
        return planned, execution.run(planned, [list(member.overrides) for member in members], self.settings)


def returned(overrides: list[str], member: studies.Experiment | None, answer: Answer, failed: MemberFailed | None) -> JobReturn:
    """What Hydra's sweeper is given of a member: its answer, or why it failed. member: None where it was refused."""
    found = JobReturn(overrides=overrides, task_name="moepress")
    if member is not None:
        found.cfg, found.working_dir = OmegaConf.create(member.config), str(member.results)
    found.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    found.return_value = failed or answer
    return found


def refuse_whole(overrides: list[str]) -> None:
    """ValueError for what no member of a sweep can be."""
    plan.refuse_out(overrides, "a sweep has many checkpoints; give out= to a single experiment")
    for override in overrides:
        if override.startswith("study="):
            raise ValueError(f"{override}: a study is many experiments already; run it without --multirun")


def is_whole(member: studies.Experiment) -> bool:
    return all((member.results / item.folder).exists() for item in member.artefacts.values())


def objective(done: Plan, member: studies.Experiment) -> Answer:
    """What the configuration's `objective` names in the member's row of runs.csv: a number, several, or None for null.

    Raises ValueError where there is no such column, nothing in it, or no report.
    """
    wanted = member.config["objective"]
    if wanted is None:
        return None
    if not Path(done.report).exists():
        raise ValueError(f"no report: {execution.failure(Path(done.results), [Path(done.report).relative_to(done.results)])}")
    own = {stage: item.folder for stage, item in member.artefacts.items()}
    listed = [{stage: run["artefacts"].get(stage) for stage in studies.MEASURED} for run in execution.runs(done)]
    number = listed.index({stage: own.get(stage) for stage in studies.MEASURED})
    row = execution.rows(Path(done.report))[number]
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name not in row:
            numbers = ", ".join(name for name, value in row.items() if isinstance(value, int | float))
            raise ValueError(f"objective={name}: runs.csv has no such column; there is {numbers}")
        if not isinstance(row[name], int | float) or math.isnan(row[name]):
            raise ValueError(f"objective={name}: {row[name]!r} for this member, which is no number; choose another column")
    values = tuple(float(row[name]) for name in names)
    return values[0] if isinstance(wanted, str) else values
