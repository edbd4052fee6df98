"""Folders of results: whole or absent, with their configuration and where they came from.

A stage is run as `python -m moepress.stages TASK.yaml OUT`: the task file, written when the DAG is planned, holds
the stage's slice of the configuration and the folders it reads. The stage fills `OUT.partial`, which survives a kill so
that long stages can go on from it, and the folder gets its name only when it is complete and on the disk. What a stage reads is
checked against its provenance first. One process at a time works at an artefact, of all that share the results: see `locks`.

A stage's module may have `WORK`, names in its folder that are only there to go on from after a kill; they are removed when the
stage is through, never before. And `HEADERS_ONLY`, roles (the part before the dash) of whose weights it reads only the headers.
"""

import errno
import importlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import yaml

from moepress import integrity, locks, progress
from moepress.composing import ROOT
from moepress.dag import Artefact, everything
from moepress.machine import hardware
from moepress.models.files import record, sync

PACKAGES = (
    "moepress",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "lm-eval",
    "numpy",
    "scipy",
    "hydra-core",
)


FINISHED = ".finished"
"""In a partial folder: its stage is through."""
HALF_WRITTEN = ("*.new", "*.partial")
"""Files that were to get their names when they were whole."""


@dataclass(frozen=True)
class Task:
    """What a stage is given. inputs: role -> folder. out: the folder to fill. runtime: device and paths of this machine."""

    stage: str
    key: str
    config: dict
    inputs: dict[str, Path]
    runtime: dict
    out: Path

    @property
    def name(self) -> str:
        return self.out.name.removesuffix(".partial")


def write_tasks(artefacts: list[Artefact], configs: dict[str, dict], results: Path) -> dict[str, Artefact]:
    """Write the task file of every artefact that the given ones need, and return them by folder.

    configs: folder -> the experiment's whole configuration, for the paths and device of this machine.
    """
    needed = everything(artefacts)
    for folder, item in needed.items():
        config = configs[folder]
        task = {
            "stage": item.stage,
            "key": item.key,
            "config": item.config,
            "inputs": {role: found.folder for role, found in item.reads.items()},
            "runtime": {
                "device": config["device"],
                "cache": str(Path(config["paths"]["cache"]).expanduser()),
                "model_path": config["model"].get("path"),
                "corpus_path": config["corpus"].get("path"),
            },
        }
        write_if_changed(task_path(results, folder), yaml.safe_dump(task, sort_keys=True, allow_unicode=True))
    return needed


def task_path(results: Path, folder: str) -> Path:
    return results / "tasks" / f"{folder}.yaml"


def write_if_changed(path: Path, text: str) -> None:
    """Write through a rename; leave the file and its time alone where it already says so."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    beside.write_bytes(text.encode())
    beside.replace(path)


def stage_main() -> None:
    """`python -m moepress.stages TASK.yaml OUT`: the stage that the task file names, with errors in one line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m moepress.stages TASK.yaml OUT (the DAG writes the task files: results/tasks/)")
    progress.use_lines()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a stage says, in its log in order with its progress
    try:
        run_stage(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    except KeyboardInterrupt:
        sys.exit("moepress: interrupted; what is whole is kept, and the next run goes on from there")
    except Exception as error:
        if (why := of_the_machine(error)) is None:
            raise
        sys.exit(f"moepress: {sys.argv[2]}: {why}; whole layers are kept, and the next run goes on from there")


def of_the_machine(error: BaseException) -> str | None:
    """What a person can do about an error of the machine (disk full, no permission, no memory); None for any other error."""
    text, number = str(error), getattr(error, "errno", None)

    def is_one_of(*numbers: int) -> bool:  # safetensors has them in its text only
        return number in numbers or any(f"(os error {each})" in text for each in numbers)

    if is_one_of(errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}); free some space or set paths.results"
    if is_one_of(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return f"cannot be written ({text}); make it writable or set paths.results"
    allocation = (
        *("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "Cannot allocate memory"),
        "failed to map segment from shared object",  # the loader, of a large library
    )
    if isinstance(error, MemoryError) or is_one_of(errno.ENOMEM) or any(words in text for words in allocation):
        said = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return f"not enough memory ({said}); let fewer stages run side by side (cores=1), or take a machine with more"
    return None


def run_stage(task_file: Path, out: Path) -> None:
    """Run one stage into `out` unless it is there already, or another process makes it."""
    described = read_task(task_file)
    inputs = {role: out.parent.parent / folder for role, folder in described["inputs"].items()}
    if not integrity.is_whole(out):
        with ExitStack() as held:
            held.enter_context(locks.hold(locks.of(out), f"makes {out} already; waiting for it"))
            if not out.exists():
                for folder in dict.fromkeys(inputs.values()):
                    held.enter_context(locks.hold(locks.of(folder), f"removes {folder}; waiting for it", shared=True))
                _make(described, inputs, out)
            elif not integrity.is_whole(out):
                raise ValueError(f"{out}: not whole, {integrity.PROVENANCE} is missing; delete the folder and run again")
    not_of_the_future([task_file, *inputs.values()])


def read_task(path: Path) -> dict:
    """What `write_tasks` wrote. Raises ValueError for any other file."""
    try:
        found = yaml.safe_load(path.read_bytes())
        if isinstance(found, dict) and found.keys() >= {"stage", "key", "config", "inputs", "runtime"}:
            return found
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a task file ({error}); the command that planned it writes it again") from error
    raise ValueError(f"{path}: not a task file, truncated or altered; the command that planned it writes it again")


def _make(described: dict, inputs: dict[str, Path], out: Path) -> None:
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for pattern in HALF_WRITTEN:  # by a process that was killed
        for path in partial.rglob(pattern):
            path.unlink()
    for role, folder in inputs.items():
        if not integrity.is_whole(folder):
            raise ValueError(f"{folder}: the input {role!r} is not there; run the DAG, or delete the folder if it is broken")
    task = Task(described["stage"], described["key"], described["config"], inputs, described["runtime"], partial)
    start, began = time.time(), time.perf_counter()
    print(f"{task.stage} {task.name}: started", file=sys.stderr)
    stage = importlib.import_module(f"moepress.stages.{task.stage}")
    finished, told = partial / FINISHED, partial / integrity.PROVENANCE
    if not finished.exists() and not told.exists():
        startup = time.process_time()
        headers_only = getattr(stage, "HEADERS_ONLY", ())
        reads = [(folder, role.partition("-")[0] not in headers_only) for role, folder in inputs.items()]
        integrity.check(reads, out.parent.parent)
        stage.run(task)
        cost = {"seconds": round(time.perf_counter() - began, 3), "startup": startup}
        config = {"config": task.config, "inputs": described["inputs"], "stage": task.stage, "key": task.key}
        (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=True, allow_unicode=True), encoding="utf-8")
        write_json(finished, provenance(task, start, **cost))
    if not told.exists():
        for name in getattr(stage, "WORK", ()):
            shutil.rmtree(partial / name) if (partial / name).is_dir() else (partial / name).unlink(missing_ok=True)
        write_json(told, integrity.sealed(read_json(finished) | {"files": files(partial)}))
    finished.unlink(missing_ok=True)
    try:
        partial.rename(out)
    except OSError:
        if not integrity.is_whole(out):
            raise
        shutil.rmtree(partial)  # where there are no locks: another process was faster
    sync(out.parent)
    print(f"{task.stage} {task.name}: done in {time.perf_counter() - began:.1f} s", file=sys.stderr)


def files(folder: Path) -> dict[str, dict]:
    """Size and hash of every file below a folder, after all of them were synced to the disk."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FINISHED):
        sync(path)
        found[str(path.relative_to(folder))] = record(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    return found


def not_of_the_future(paths: Iterable[Path]) -> None:
    """Set file times that lie in the future to now. A clock that was wrong leaves them once it is set back, and Snakemake
    refuses inputs that are newer than what was made from them."""
    now = time.time()
    for path in paths:
        for carrier in (path, path / ".snakemake_timestamp"):
            with suppress(OSError):  # not there, or not ours to touch
                if carrier.stat().st_mtime > now:
                    os.utime(carrier)


def provenance(task: Task, start: float, seconds: float, startup: float) -> dict:
    """Where a folder came from and what it cost since the stage was last started (what was spent before a kill is not known any
    more). start: seconds of the epoch. startup: CPU seconds before the stage began its work."""
    return {
        "stage": task.stage,
        "key": task.key,
        "command": [Path(sys.executable).name, *sys.argv],
        "git_commit": git_commit(),
        "start": datetime.fromtimestamp(start, UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "cpu_seconds": {"startup": round(startup, 3), "total": round(time.process_time(), 3)},
        "peak_memory_bytes": peak_memory(),
        "device": hardware(task.runtime["device"]),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **versions()},
        "inputs": {role: str(folder.name) for role, folder in task.inputs.items()},
    }


def versions() -> dict[str, str]:
    """Package -> version, of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The checkout's commit, with `+changes` where the tree differs from it; None outside a checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    call = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() or None


def write_json(path: Path, value) -> None:
    """Write through a rename, so that a kill, or the machine's end, leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    sync(beside)
    beside.replace(path)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_config(folder: Path) -> dict:
    """The slice of the configuration that made a folder."""
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["config"]
