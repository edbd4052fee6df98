"""Writes the records of a report as W&B runs, on the server or into a local folder. The only module that calls W&B to log."""

import json
import os
import shutil
import sys
import traceback
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from moepress import integrity, progress
from moepress.artefacts import read_json, write_json
from moepress.lookup import StoredArtefact
from moepress.secrets import without_secrets
from moepress.tracking.records import Record, of_report

DESCRIBE_A_RUN = ("NOTES", "TAGS", "NAME", "RUN_GROUP", "JOB_TYPE", "RUN_ID", "RESUME", "SWEEP_ID", "SWEEP_PARAM_PATH", "HOST")
"""Variables WANDB_* that would be written into every run; what a run is, the artefacts say."""
NOT_SENT = (".snakemake_timestamp",)
SECONDS_TO_ANSWER = 20


class NotReachable(ValueError):
    """W&B does not answer, or does not let this user in; the message is a line that says what to do."""


@dataclass(frozen=True)
class Target:
    """Where runs go. mode: offline or online; project, entity, upload: conf/tracking/."""

    results: Path
    mode: str
    project: str
    entity: str | None = None
    upload: tuple[str, ...] = ()

    def note(self, record: Record) -> Path:
        """Says that a run was mirrored whole, and what of."""
        return self.results / "tracking" / self.mode / "runs" / f"{record.id}.json"

    def local_folders(self, record: Record) -> list[Path]:
        """Those that W&B made for a run while offline."""
        return sorted((self.results / "wandb").glob(f"offline-run-*-{record.id}"))

    def has(self, record: Record) -> bool:
        """Whether the run is mirrored as it is now."""
        note = self.note(record)
        if not note.is_file():
            return False
        told = read_json(note)
        is_there = self.mode == "online" or (self.results / "wandb" / told["folder"]).is_dir()
        return is_there and told["content"] == self.content(record)

    def content(self, record: Record) -> list:
        return [record.digest, self.project, self.entity, sorted(self.upload)]


def mirror(report: StoredArtefact, target: Target) -> tuple[list[dict], list[str]]:
    """Mirror every record of a report that is not mirrored yet, and return `[{id, name, job_type}]` of all, and what failed.

    Mirrored again, a run is updated. Raises NotReachable.
    """
    for name in DESCRIBE_A_RUN:
        os.environ.pop(f"WANDB_{name}", None)
    # What is sent later lies with the runs, not in the user's folder: the tables that W&B stages.
    os.environ.setdefault("WANDB_DATA_DIR", str((target.results / "wandb").resolve()))
    import wandb

    if target.mode == "online":
        check_online()
    records, failures = of_report(report)
    missing = [record for record in records if not target.has(record)]
    entries: dict[str, list] = {}
    for record in tqdm(missing, desc=f"W&B {target.mode}", unit="run"):
        try:
            integrity.check([(record.makes.path, False)] if record.makes else [], report.results)
            send(record, target, entries)
        except wandb.Error as error:
            if target.mode == "online":
                raise NotReachable(f"W&B stopped answering ({error})") from error
            failures.append(f"{record.name}: {error}")
        except Exception as error:
            failures.append(f"{record.name}: {type(error).__name__}: {error}")
    return [{"id": record.id, "name": record.name, "job_type": record.job_type} for record in records], failures


def check_online() -> str:
    """The address of the W&B server that answers and accepts this user's key. NotReachable where there is none."""
    os.environ.setdefault("WANDB_SILENT", "true")  # what matters is said here; it would warn of every artifact that it has
    import wandb

    address = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(f"{address}/healthz", timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        raise NotReachable(f"W&B cannot be reached at {without_secrets(address)} ({first_line(error)})") from error
    try:
        wandb.login(verify=True, timeout=SECONDS_TO_ANSWER)
    except wandb.Error as error:
        raise NotReachable(f"W&B does not let you in ({first_line(error)}); `wandb login` stores a key") from error
    return address


def first_line(error: BaseException) -> str:
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])


def send(record: Record, target: Target, entries: dict[str, list]) -> None:
    """Write one run whole, and then note that. entries: folder -> its artefact's files, hashed once for all runs."""
    import wandb

    old = target.local_folders(record) if target.mode == "offline" else []
    with wandb.init(
        project=target.project,
        entity=target.entity,
        group=record.group,
        job_type=record.job_type,
        name=record.name,
        id=record.id,
        config=record.config,
        mode=target.mode,  # type: ignore[arg-type]
        dir=str(target.results),
        resume="allow" if target.mode == "online" else None,
        settings=quiet(wandb),
    ) as run:
        # `wandb sync` adds the steps of a folder behind those that the server has: they must not be sent twice.
        was_sent = any(list(path.glob("*.wandb.synced")) for path in old)
        write(run, record, target, entries, len(record.curves) + 1 if was_sent else run.starting_step)
        folder = Path(run.dir).parent
    for path in old:
        if path != folder:
            shutil.rmtree(path, ignore_errors=True)
    told = {"content": target.content(record), "folder": folder.name, "job_type": record.job_type}
    note = target.note(record)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, told | {"generation": record.generation})


def quiet(wandb):
    """No capture of this process: its command, git remote, environment and machine say nothing of how the artefact was
    made (its provenance does) and may hold what is private."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=60,
    )


def write(run, record: Record, target: Target, entries: dict[str, list], first_step: int) -> None:
    """Lineage, curves, media and summary. first_step: the steps before it are at W&B already."""
    for item in record.uses:
        use(run, artefact(item, target, entries), item.key)
    run.define_metric("layer", hidden=True, summary="none")
    run.define_metric("training/step", hidden=True, summary="none")
    for prefix, axis in (
        ("allocation", "layer"),
        ("quantization", "layer"),
        ("evaluation", "layer"),
        ("training", "training/step"),
    ):
        for name in sorted({name for row in record.curves for name in row if name.startswith(f"{prefix}/")} - {axis}):
            run.define_metric(name, step_metric=axis, summary="none")
    for step, row in enumerate(record.curves):
        if step >= first_step:
            run.log(row, step=step)
    media = record.media() if len(record.curves) >= first_step else {}
    if media:
        run.log({name: as_media(item) for name, item in media.items()}, step=len(record.curves))
    run.summary.update(record.summary)
    if record.makes is not None:
        run.log_artifact(artefact(record.makes, target, entries), aliases=["latest", record.makes.key])


def use(run, made, key: str) -> None:
    """Declare an artefact as read by a run. `run.use_artifact` does this for an artifact that is described rather than looked
    up, but then waits for the server, and refuses to while offline, although `wandb sync` knows what to do with it."""
    run._log_artifact(made, aliases=[key], is_user_created=True, use_after_commit=True)


def artefact(item: StoredArtefact, target: Target, entries: dict[str, list]):
    """A W&B artifact: one collection for a stage and label, its version known by the key. Files are referred to by their
    path, size and hash, but copied for the stages of `tracking.upload`."""
    import wandb

    made = item.provenance
    metadata = {"key": item.key, "config": item.described["config"], "inputs": item.described["inputs"]}
    metadata |= {name: made[name] for name in ("git_commit", "start", "seconds", "device", "versions")}
    found = wandb.Artifact(f"{item.stage}-{item.label}"[:128], item.stage, metadata=without_secrets(metadata))
    if item.folder not in entries:
        entries[item.folder] = list(add_files(found, item, copied=item.stage in target.upload))
        return found
    for entry in entries[item.folder]:
        found.manifest.add_entry(entry)
    return found


def add_files(made, item: StoredArtefact, copied: bool):
    """Add an artefact's files and yield the entries that W&B makes of them."""
    for path in sorted(path for path in item.path.rglob("*") if path.is_file() and path.name not in NOT_SENT):
        name = str(path.relative_to(item.path))
        if copied:  # artefacts never change: W&B may read them where they lie
            yield made.add_file(str(path.resolve()), name=name, policy="immutable", skip_cache=True)
        else:
            yield from made.add_reference(f"file://{path.resolve()}", name=name)


def as_media(item):
    """A table, a picture's pixels or its file as W&B takes them."""
    import wandb

    if isinstance(item, pd.DataFrame):
        return wandb.Table(dataframe=item.map(without_secrets))
    return wandb.Image(str(item) if isinstance(item, Path) else item)


def main(arguments: list[str]) -> None:
    """`python -m moepress.tracking REPORT NOTE SETTINGS`: the mode is the name of NOTE's folder, SETTINGS is JSON.

    Ends well whatever happens to the mirror: the results are whole without it. The note tells, and the next run of the same
    command tries again what did not succeed.
    """
    report, note, settings = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    mode = note.parent.name
    progress.use_lines()
    sys.stdin = open(os.devnull)  # noqa: SIM115 - W&B asks nobody for a key
    told = {"report": report.name, "settings": settings, "complete": False}
    try:
        target = Target(report.parent.parent, mode, **settings)
        told["runs"], failures = mirror(StoredArtefact(target.results, f"report/{report.name}"), target)
        told["complete"] = not failures
        why = f"not every run was mirrored ({len(failures)} failed, the first: {failures[0]})" if failures else ""
    except NotReachable as error:
        why = str(error)
    except Exception as error:  # ours to mend, but no reason to fail what is mirrored
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        why = f"{type(error).__name__}: {error}"
    if not told["complete"]:
        told["why"] = " ".join(without_secrets(why).split())
        print(
            f"moepress: tracking={mode}: {told['why']}. The results are whole; the same command tries again, and "
            "tracking=offline mirrors without network",
            file=sys.stderr,
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, told)
