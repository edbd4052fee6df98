"""A sweep as one DAG against the same members one by one with nothing shared; composing a hundred variants; a rerun:

python benchmarks/sweep.py [--compose-only] [quantization=gptq,qesc allocation.bits=2,3 ...]

On a random Mixtral of two layers, so that starting processes is most of the time in both.
"""

import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import small_experiment, write_model, write_texts

SWEEP = ["allocation=uniform,pmq", "allocation.bits=2,3", "quantization=gptq,qesc"]


def timed(command: list[str], place: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - start


def compose(small: list[str]) -> None:
    from moepress import dag, plan

    ranges = (("gptq", "qesc"), ("pmq", "uniform"), (2, 3), range(13))
    lines = [
        f"quantization={method} allocation={allocation} allocation.bits={bits} seed={seed}"
        for method, allocation, bits, seed in itertools.product(*ranges)
    ][:100]
    for name, own in (("the default model", []), ("a model folder", small)):
        start, cpu = time.perf_counter(), time.process_time()
        members = [dag.experiment([*own, *shlex.split(line)]) for line in lines]
        found = dag.everything([dag.report_artefact(*plan.joined(members))])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{len(lines)} variants of {name}: {len(found)} artefacts in {seconds:.2f} s, {cpu:.2f} of the CPU", flush=True)


if __name__ == "__main__":
    sweep = [argument for argument in sys.argv[1:] if not argument.startswith("-")] or SWEEP
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small = small_experiment(write_model(place / "model"), write_texts(place / "texts"))
        compose(small)
        if "--compose-only" in sys.argv:
            sys.exit()
        command = [sys.executable, "-m", "moepress", *small]
        together = timed([*command[:3], "--multirun", *small, *sweep], place)
        again = timed([*command[:3], "--multirun", *small, *sweep], place)
        members = list(
            itertools.product(*([f"{o.partition('=')[0]}={v}" for v in o.partition("=")[2].split(",")] for o in sweep))
        )
        print(f"{len(members)} members as one DAG: {together:.0f} s; again, with nothing to do: {again:.1f} s", flush=True)
        alone = 0.0
        for number, member in enumerate(members):
            alone += timed([*command, *member, f"paths.results=alone-{number}"], place)
            print(f"one by one with nothing shared: {alone:.0f} s after {number + 1}", flush=True)
        print(f"ratio {together / alone:.2f}")
