"""Snakemake's lock on its working folder, and what is left of it when a run is killed.

Snakemake locks the folder it works in and, killed, leaves it locked: the next run would only say so. Here that run removes
the lock once it is sure that nobody works there any more: its owner was on this machine and is gone, and so are its jobs.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moepress.config import ROOT

OWNER = Path(".snakemake") / "moepress.json"
"""Who started the Snakemake that works here: written before it starts, removed when it has ended."""


@contextmanager
def snakemake(command: list[str]) -> Iterator[subprocess.Popen]:
    """A Snakemake process in this folder, which is unlocked first where a killed run left it locked.

    Raises ValueError naming the process that still works here.
    """
    if is_stale():
        print("moepress: the last run here was killed; going on from what is whole", file=sys.stderr)
        unlock = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--unlock", "--quiet", "all"]
        subprocess.run([*unlock, *command[command.index("--configfile") :][:2]], check=True, capture_output=True)
    OWNER.parent.mkdir(exist_ok=True)
    OWNER.write_text(json.dumps({"host": platform.node()}), encoding="utf-8")
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        if process.poll() is not None:
            OWNER.unlink(missing_ok=True)


def is_stale() -> bool:
    """Whether there is a lock whose owner, a moepress of this machine, was killed."""
    is_locked = any(Path(".snakemake", "locks").glob("*.lock"))
    if not is_locked or not OWNER.is_file() or json.loads(OWNER.read_text(encoding="utf-8"))["host"] != platform.node():
        return False  # unlocked, or a question for Snakemake and the user
    if working := working_here():
        raise ValueError(f"process {working[0]} still works in {Path.cwd()}: wait for it, or end it and start again")
    return True


def working_here() -> list[int]:
    """Processes of this machine that are a Snakemake or a stage with this working folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        is_job = any(word in ("snakemake", "moepress.stages") or word.endswith("/snakemake") for word in words)
        if is_job and process.info["cwd"] == str(Path.cwd()):
            found.append(process.info["pid"])
    return found
