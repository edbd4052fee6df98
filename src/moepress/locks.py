"""Who may work where: one run in a working folder, one process at an artefact, and what a killed run leaves behind.

Locks are the kernel's (flock): a process that dies, however it dies, holds none. Two checkouts or machines that share a
results folder meet at its artefacts: a stage holds its own alone and shares those that it reads, so each is computed once
and none is removed under a reader. Network file systems must honour flock (NFS 4 does, Lustre mounted with `flock`).

Snakemake has a lock of its own, a file that a killed run leaves behind; the next run would only say so. Here that run removes
it once it is sure that nobody works there any more: the owner was on this machine, and is gone.
"""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

OWNER = Path(".snakemake") / "moepress.json"
"""On which machine the Snakemake runs that works here: written before it locks the folder."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Held(Exception):
    """Another process has the lock. Its text says which."""


@contextmanager
def hold(path: Path, waiting: str | None = None, shared: bool = False) -> Iterator[int | None]:
    """A lock with the name `path`, a file that is there as long as somebody holds it; gives its file descriptor.

    waiting: what to print before waiting for it; None raises Held instead. Where there can be no lock (a file system without
    them, or one that is only read) it gives None.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    file = _opened(path, kind, waiting)
    if file is None:
        yield None
        return
    try:
        yield file
    finally:
        with suppress(OSError):  # the last one takes the file away
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(file)


def _opened(path: Path, kind: int, waiting: str | None) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            try:
                file = os.open(path, os.O_RDONLY)  # another person's
            except OSError:
                return None
        try:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
                if waiting is None:
                    raise Held(owner) from None
                print(f"moepress: {owner} {waiting}", file=sys.stderr, flush=True)
                fcntl.flock(file, kind)
            if _is_named(file, path):
                if kind == fcntl.LOCK_EX:
                    with suppress(OSError):
                        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".ljust(80).encode(), 0)
                return file
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"moepress: {path.parent} has no locks; let no two runs work there at a time", file=sys.stderr)
                os.close(file)
                return None
            os.close(file)
            raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the one who held it took the file away: begin again with the new one


def _is_named(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def of(folder: Path) -> Path:
    """The name of an artefact's lock."""
    return folder.with_name(f".{folder.name.removesuffix('.partial')}.lock")


def working_folder():
    """This folder, for one moepress at a time; its Snakemake is to be given the lock, too."""
    waiting = f"works in {Path.cwd()}; waiting for it (Ctrl-C ends only the waiting)"
    return hold(Path(".snakemake") / "moepress.lock", waiting)


@contextmanager
def snakemake(command: list[str], lock: int | None) -> Iterator[subprocess.Popen]:
    """A Snakemake process in this folder. lock: what it holds as well, for it may outlive this process.

    Raises ValueError naming a process that works here without moepress.
    """
    if any(Path(".snakemake", "locks").glob("*.lock")) and (working := working_here(("snakemake",))):
        raise ValueError(f"process {working[0]} still works in {Path.cwd()}: wait for it, or end it and start again")
    process = subprocess.Popen(command, pass_fds=() if lock is None else (lock,))
    try:
        yield process
    finally:
        process.wait()


def inside_snakemake() -> None:
    """The first call of our Snakefile: note that a Snakemake works in this folder; before that, remove the lock that a killed
    one left behind."""
    locks = list(Path(".snakemake", "locks").glob("*.lock"))
    if locks and is_stale():
        print("moepress: the last run here was killed; going on from what is whole", file=sys.stderr)
        for lock in locks:
            lock.unlink(missing_ok=True)
    if not any(lock.exists() for lock in locks):
        with suppress(OSError):  # a folder that is only read
            OWNER.parent.mkdir(exist_ok=True)
            OWNER.write_text(json.dumps({"host": platform.node()}), encoding="utf-8")


def is_stale() -> bool:
    """Whether Snakemake's lock is that of a run on this machine that is gone."""
    try:
        owner = json.loads(OWNER.read_text(encoding="utf-8"))["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a question for Snakemake and the user
    return owner == platform.node() and not working_here(("snakemake",))


def working_here(kinds: tuple[str, ...] = ("snakemake", "moepress.stages")) -> list[int]:
    """Other processes of this machine that are a Snakemake or a stage with this working folder."""
    found, own = [], {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        is_job = any(word in kinds or Path(word).name in kinds for word in words[:4])
        if is_job and process.info["cwd"] == str(Path.cwd()) and process.info["pid"] not in own:
            found.append(process.info["pid"])
    return found
