"""Folders of results: whole or absent, with their configuration and where they came from.

A stage is run as `python -m moepress.stages TASK.yaml OUT`: the task file, written when the DAG is planned, holds
the stage's slice of the configuration and the folders it reads. The stage fills `OUT.partial`, which survives a kill so
that long stages can go on from it, and the folder gets its name only when it is complete.
"""

import errno
import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import yaml

from moepress import progress
from moepress.config import ROOT, hardware
from moepress.dag import Artefact, everything
from moepress.models.files import record

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
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def stage_main() -> None:
    """`python -m moepress.stages TASK.yaml OUT`: the stage that the task file names, with errors in one line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m moepress.stages TASK.yaml OUT (the DAG writes the task files: results/tasks/)")
    progress.use_lines()
    try:
        run_stage(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    except KeyboardInterrupt:
        sys.exit("moepress: interrupted; what is whole is kept, and the next run goes on from there")
    except Exception as error:
        if not is_disk_full(error):
            raise
        sys.exit(
            f"moepress: {sys.argv[2]}: the disk is full ({error}); free some space or set paths.results: whole layers are "
            "kept, and the next run goes on from there"
        )


def is_disk_full(error: Exception) -> bool:
    """Whether an error, of the system or of safetensors, says that no byte more can be written."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def run_stage(task_file: Path, out: Path) -> None:
    """Run one stage into `out` unless it is there already."""
    if out.exists():
        return
    described = yaml.safe_load(task_file.read_text(encoding="utf-8"))
    results = out.parent.parent
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    inputs = {role: results / folder for role, folder in described["inputs"].items()}
    for role, folder in inputs.items():
        if not (folder / "provenance.json").is_file():
            raise ValueError(f"{folder}: the input {role!r} is not there; run the DAG, or delete the folder if it is broken")
    task = Task(described["stage"], described["key"], described["config"], inputs, described["runtime"], partial)
    start = time.time()
    print(f"{task.stage} {task.name}: started", file=sys.stderr)
    stage = importlib.import_module(f"moepress.stages.{task.stage}")
    startup = time.process_time()
    stage.run(task)
    config = {"config": task.config, "inputs": described["inputs"], "stage": task.stage, "key": task.key}
    (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=True, allow_unicode=True), encoding="utf-8")
    write_json(partial / "provenance.json", provenance(task, start, startup))
    partial.rename(out)
    print(f"{task.stage} {task.name}: done in {time.time() - start:.1f} s", file=sys.stderr)


def provenance(task: Task, start: float, startup: float) -> dict:
    """Where a folder came from and what it cost. startup: CPU seconds spent before the stage began its work."""
    files = {str(p.relative_to(task.out)): record(p) for p in sorted(task.out.rglob("*")) if p.is_file()}
    return {
        "stage": task.stage,
        "key": task.key,
        "command": [Path(sys.executable).name, *sys.argv],
        "git_commit": git_commit(),
        "start": datetime.fromtimestamp(start, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - start, 3),
        "cpu_seconds": {"startup": round(startup, 3), "total": round(time.process_time(), 3)},
        "peak_memory_bytes": peak_memory(),
        "device": hardware(task.runtime["device"]),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **versions()},
        "inputs": {role: str(folder.name) for role, folder in task.inputs.items()},
        "files": files,
    }


def versions() -> dict[str, str]:
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
    """Write through a rename, so that a kill leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_config(folder: Path) -> dict:
    """The slice of the configuration that made a folder."""
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["config"]
