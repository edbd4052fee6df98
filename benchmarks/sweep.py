"""A sweep as one DAG against the same members one by one with nothing shared; composing a hundred variants; a rerun:

python benchmarks/sweep.py [--compose-only | --issue] [--tiny=FOLDER] [--place=FOLDER] [allocation.bits=2,3 ...]

Without --tiny on a random Mixtral of two layers, so that starting processes is most of the time in both. --tiny: on the default
model, trained already; FOLDER is a results folder with its model and corpus, which both ways are given. --issue: the 18
members `allocation=uniform,pmq,global allocation.bits=2,2.5,3 quantization=gptq,qesc`, of which two are refused (no uniform
width is 2.5 bits), so that 16 are timed in both ways. --place: where to work, kept: a run that was stopped goes on there with
the members that were not yet timed.
"""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import small_experiment, write_model, write_texts

SWEEP = ["allocation=uniform,pmq", "allocation.bits=2,3", "quantization=gptq,qesc"]
ISSUE = ["allocation=uniform,pmq,global", "allocation.bits=2,2.5,3", "quantization=gptq,qesc"]


def timed(command: list[str], place: Path, some_refused: bool = False) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode and not (some_refused and "the others are whole" in done.stderr):
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - start


def compose(small: list[str]) -> None:
    from moepress import dag, plan, studies

    ranges = (("gptq", "qesc"), ("pmq", "uniform"), (2, 3), range(13))
    lines = [
        f"quantization={method} allocation={allocation} allocation.bits={bits} seed={seed}"
        for method, allocation, bits, seed in itertools.product(*ranges)
    ][:100]
    for name, own in (("the default model", []), ("a model folder", small)) if small else (("the default model", []),):
        start, cpu = time.perf_counter(), time.process_time()
        members = [studies.experiment([*own, *shlex.split(line)]) for line in lines]
        found = dag.everything([studies.report_artefact(*plan.joined(members))])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{len(lines)} variants of {name}: {len(found)} artefacts in {seconds:.2f} s, {cpu:.2f} of the CPU", flush=True)


def give(tiny: Path | None, results: Path) -> None:
    """Let a results folder begin with the trained model and its corpus, as links: the same for both ways."""
    for stage in ("model", "corpus") if tiny else ():
        (results / stage).mkdir(parents=True, exist_ok=True)
        for folder in (tiny / stage).resolve(strict=True).iterdir():
            if not (results / stage / folder.name).exists():
                (results / stage / folder.name).symlink_to(folder)


def is_possible(overrides: list[str]) -> bool:
    from moepress.config import resolve

    try:
        resolve(overrides)
    except ValueError:
        return False
    return True


def measure(place: Path, small: list[str], sweep: list[str], tiny: Path | None) -> None:
    """Print seconds as one DAG, of the same again, and one by one; what is in place/times.json is not timed again."""
    kept = place / "times.json"
    times = json.loads(kept.read_text()) if kept.is_file() else {}
    command = [sys.executable, "-m", "moepress", *small]

    parts = [override.partition("=") for override in sweep]
    asked = list(itertools.product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in parts)))
    members = [member for member in asked if is_possible([*small, *member])]

    def once(name: str, arguments: list[str], results: str) -> float:
        if name not in times:
            if name != "again":  # what was begun and not timed
                shutil.rmtree(place / results, ignore_errors=True)
            give(tiny, place / results)
            times[name] = timed(arguments, place, len(members) < len(asked))
            kept.write_text(json.dumps(times, indent=1))
        return times[name]

    together = [*command[:3], "--multirun", *small, *sweep]
    one_dag, again = once("one DAG", together, "results"), once("again", together, "results")
    print(f"{len(members)} members as one DAG: {one_dag:.0f} s; again, with nothing to do: {again:.1f} s", flush=True)
    alone = 0.0
    for number, member in enumerate(members):
        place_of_its_own = f"alone-{number}"
        alone += once(" ".join(member), [*command, *member, f"paths.results={place_of_its_own}"], place_of_its_own)
        print(f"one by one with nothing shared: {alone:.0f} s after {number + 1}", flush=True)
    print(f"ratio {one_dag / alone:.2f}")


def main(arguments: list[str]) -> None:
    options = dict(one.removeprefix("--").partition("=")[::2] for one in arguments if one.startswith("--"))
    if unknown := options.keys() - {"compose-only", "issue", "tiny", "place"}:
        sys.exit(f"unknown: --{unknown.pop()}\n{__doc__}")
    sweep = [one for one in arguments if not one.startswith("--")] or (ISSUE if "issue" in options else SWEEP)
    tiny = Path(options["tiny"]).resolve(strict=True) if "tiny" in options else None
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.get("place", temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if tiny:
            small = []
        else:
            if not (place / "model").exists():
                write_model(place / "model"), write_texts(place / "texts")
            small = small_experiment(place / "model", place / "texts")
        if not (place / "times.json").is_file():
            compose(small)
        if "compose-only" not in options:
            measure(place, small, sweep, tiny)


if __name__ == "__main__":
    main(sys.argv[1:])
