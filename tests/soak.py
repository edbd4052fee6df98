"""Members of a study in random order, stopped at random moments in every way, for as long as one likes.

    python tests/soak.py --minutes 60 [study=default KEY=VALUE ...]

After each stop: what was whole still is; nothing half-made has a name; no process is left behind; memory and files do not grow.
In the end every member that was begun is finished, and every file verified. Works in build/soak (--place), and goes on from
what is there.
"""

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
WAYS = ("SIGINT", "SIGTERM", "SIGKILL", "SIGKILL of Snakemake alone", "SIGKILL of a stage", "none")


class Place:
    """The working folder: what runs in it, and what is left there."""

    def __init__(self, folder: Path):
        self.folder, self.temporary, self.results = folder, folder / "tmp", folder / "results"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        self.whole = self.provenances()

    def provenances(self) -> dict[str, bytes]:
        return {str(p.parent): p.read_bytes() for p in self.results.glob("*/*-????????????/provenance.json")}

    def start(self, overrides: list[str]) -> subprocess.Popen:
        with (self.folder / "out.txt").open("a") as log:
            command = [sys.executable, "-m", "moepress", *overrides]
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True)

    def working(self) -> list[psutil.Process]:
        """Processes that have this working folder."""
        found = []
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] == str(self.folder):
                found.append(process)
        return found

    def checked(self) -> int:
        """Compare with before; the number of new artefacts. Raises SystemExit for what is lost, changed or half-made."""
        for path in self.results.glob("*/*-????????????"):
            if path.is_dir() and not (path / "provenance.json").is_file():
                raise SystemExit(f"{path}: has its name and is not whole")
        now = self.provenances()
        for path, told in self.whole.items():
            if now.get(path) != told:
                raise SystemExit(f"{path}: {'made again' if path in now else 'lost'}")
        new, self.whole = len(now) - len(self.whole), now
        return new

    def files(self) -> Counter:
        """What a stop might leave: temporary files, unfinished folders, locks."""
        found = Counter(temporary=sum(1 for _ in self.temporary.iterdir()))
        found["partial"] = len(list(self.results.glob("*/*.partial")))
        found["locks"] = len(list(self.results.glob("*/.*.lock")))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=90, help="seconds before a stop")
    parser.add_argument("--place", type=Path, default=Path("build/soak"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    names = [o.partition("=")[2] for o in given.overrides if o.startswith("study=")] or ["default"]
    study = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "study" / f"{names[-1]}.yaml"))
    rest = [o for o in given.overrides if not o.startswith("study=")]
    members = [[*study["base"], *shlex.split(line), *rest] for line in study["experiments"]]
    soak(Place(given.place.resolve()), members, random.Random(given.seed), 60 * given.minutes, given.longest)


def soak(place: Place, members: list[list[str]], rng: random.Random, seconds: float, longest: float) -> None:
    end, ways, begun, peaks, new = time.monotonic() + seconds, Counter(), [], [], 0
    while time.monotonic() < end:
        member = rng.choice(members)
        begun += [member] if member not in begun else []
        way = rng.choice(WAYS)
        running = place.start(member)
        patience = 5 * longest if way == "none" else rng.uniform(1, longest)
        peak = watched(place, running, min(end, time.monotonic() + patience))
        peaks.append(peak)
        ways["finished" if running.poll() == 0 else way] += 1
        if running.poll() is None:
            stop(place, running, way)
        settle(place)
        new += place.checked()
        print(f"{way}: {' '.join(member)}: {new} artefacts, {peak / 2**20:.0f} MiB, {dict(place.files())}", flush=True)
    for member in begun:
        if place.start(member).wait() != 0:
            raise SystemExit(f"{' '.join(member)}: did not finish; see {place.folder / 'out.txt'}")
    new += place.checked()
    third = max(1, len(peaks) // 3)
    early, late = (sum(part) / len(part) / 2**20 for part in (peaks[:third], peaks[-third:]))
    verify = [sys.executable, "-m", "moepress", "verify"]
    code = subprocess.run(verify, cwd=place.folder, env=place.env).returncode
    print(f"{sum(ways.values())} runs: {dict(ways)}; {new} artefacts, none lost, none made again; left: {dict(place.files())}")
    print(f"peak memory of a run: {early:.0f} MiB in the first third, {late:.0f} MiB in the last")
    sys.exit(code)


def watched(place: Place, running: subprocess.Popen, until: float) -> int:
    """Wait for the end of a process, or for the moment; the most memory (bytes) that all together had."""
    peak = 0
    while running.poll() is None and time.monotonic() < until:
        total = 0
        for process in place.working():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.25)
    return peak


def stop(place: Place, running: subprocess.Popen, way: str) -> None:
    """In one of the ways."""
    kind = {"SIGKILL of Snakemake alone": "snakemake", "SIGKILL of a stage": "moepress.stages"}.get(way)
    if kind is None:
        os.killpg(running.pid, getattr(signal, way, signal.SIGINT))
    else:
        for process in place.working():
            try:
                if kind in process.cmdline()[:4]:
                    process.kill()
            except psutil.Error:
                continue
    running.wait()


def settle(place: Place, seconds: float = 1800) -> None:
    """Wait for what outlived its Snakemake: a stage may end its work. Raises SystemExit for one that never does."""
    end = time.monotonic() + seconds
    while working := place.working():
        if time.monotonic() > end:
            raise SystemExit(f"process {working[0].pid} is left behind")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
