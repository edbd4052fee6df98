"""Stages killed with SIGKILL at seeded moments, started again, and compared byte for byte with undisturbed ones.

    python tests/faults.py --kills 100 --seed 0

A moment is a time, or the n-th thing that the stage does to a file of its own: the narrow places between two writes, which a
time hardly ever hits. Every start is a process of its own, forked from one that has imported the libraries, and runs the
stage's own code, `artefacts.run_stage`. What an undisturbed run leaves is compared with what is there after one to four kills
and one start that is left alone. Prints a line for each stage: kills, those at a write, lives, and the bytes compared.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TIMES = {"provenance.json", "timing.json", ".snakemake_timestamp"}
"""Files that tell of one run's time and place."""
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime"}
KILLS_OF_A_LIFE = 4
PATIENCE = 300
"""Seconds for one start."""


def plans(place: Path) -> dict:
    """Folder -> artefact of everything that is killed: every stage, on a model of a few kilobytes."""
    from conftest import small_experiment, write_model, write_texts
    from moepress import dag, plan, studies

    small = small_experiment(write_model(place / "model"), write_texts(place / "texts"))
    small += ["device=cpu", "calibration.num_sequences=4", "evaluation.num_blocks=2", f"paths.results={place / 'whole'}"]
    members = [
        ["quantization=qesc", "allocation.bits=2.5", "evaluation.decomposition=true", "evaluation.divergence=true"],
        ["quantization=best", "allocation=uniform", "allocation.bits=2", *QUICK_BEST],
        ["quantization=rtn", "allocation=global", "allocation.bits=3", "pruning=odp"],
    ]
    found = plan.for_experiments([studies.experiment([*small, *member]) for member in members]).artefacts
    tiny = [o for o in small if not o.startswith("model")]
    trained = dag.artefact("model", studies.experiment([*tiny, *TINY]).config)
    plan.write_tasks(
        [trained], dict.fromkeys(dag.everything([trained]), studies.experiment([*tiny, *TINY]).config), place / "whole"
    )
    return found | {trained.folder: trained}


QUICK_BEST = ["quantization.tune_steps=2", "quantization.distill_steps=3"]
TINY = [
    "model=tiny",
    *("model.architecture.hidden_size=32", "model.architecture.intermediate_size=32", "model.architecture.num_hidden_layers=2"),
    *("model.architecture.num_attention_heads=2", "model.tokenizer.vocab_size=300", "model.tokenizer.characters=20000"),
    *("model.training.steps=12", "model.training.batch_size=4", "model.training.seq_len=32", "model.training.save_seconds=0"),
    *("model.held_out.seq_len=32", "model.held_out.num_sequences=4"),
]


# --- a process of a stage --------------------------------------------------------------------------------------------


def start(task: Path, out: Path, log: Path, at_write: int | None = None, count: Path | None = None) -> int:
    """Fork a process that runs the stage; its id. at_write: where it kills itself. count: where it leaves the number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        written, own = [0], os.path.join(str(out.parent), "")

        def hook(event: str, arguments: tuple) -> None:
            path = arguments[0] if arguments else None
            is_write = event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3)
            if not is_write or not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(own):
                return
            written[0] += 1
            if written[0] == at_write:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        import threading

        import torch
        from tqdm import tqdm

        from moepress import artefacts

        tqdm.set_lock(threading.RLock())  # its own is shared by all that are forked: one killed with it would stop them all
        torch.set_num_threads(1)  # a thread pool of its own, before any thread asks for one
        artefacts.run_stage(task, out)
        if count is not None:
            count.write_text(str(written[0]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, seconds: float = PATIENCE) -> int | None:
    """The exit code of a process, negative for a signal; None where it works on after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def undisturbed(task: Path, out: Path, log: Path) -> tuple[float, int]:
    """Run a stage to its end; its seconds and its number of writes."""
    began, count = time.monotonic(), log.with_suffix(".count")
    code = ended(start(task, out, log, count=count))
    if code != 0:
        raise SystemExit(f"{out}: ended with {code}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - began, int(count.read_text())


def life(rng: random.Random, task: Path, whole: Path, out: Path, log: Path, seconds: float, writes: int) -> Counter:
    """Kill a stage some times, let it finish, and compare. Raises SystemExit for bytes that differ."""
    told = Counter(lives=1)
    for _ in range(rng.randint(1, KILLS_OF_A_LIFE)):
        if rng.random() < 0.6:
            code = ended(start(task, out, log, at_write=rng.randint(1, writes)))
            told["at a write"] += code == -signal.SIGKILL
        else:
            child = start(task, out, log)
            if (code := ended(child, rng.uniform(0, seconds))) is None:
                os.kill(child, signal.SIGKILL)
                code = ended(child)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"{out}: ended with {code} after a kill:\n{log.read_text()[-3000:]}")
        told["kills"] += code == -signal.SIGKILL
        if out.exists() and not (out / "provenance.json").is_file():
            raise SystemExit(f"{out}: there, and not whole")
    undisturbed(task, out, log)
    told["bytes"] = same(whole, out)
    return told


def same(whole: Path, out: Path) -> int:
    """The number of bytes that are the same in two folders. Raises SystemExit naming a file that differs."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and p.name not in TIMES} for f in (whole, out)]
    if names[0] != names[1]:
        raise SystemExit(f"{out}: other files than {whole}: {sorted(names[0] ^ names[1])}")
    for name in names[0]:
        if (whole / name).read_bytes() != (out / name).read_bytes() and (whole.parent.name, name) not in MEASURED:
            raise SystemExit(f"{out / name}: other bytes than {whole / name}")
    return sum((out / name).stat().st_size for name in names[0])


MEASURED = {("latency", "latency.json")}
"""Times, which are the result itself."""


def beside(whole: Path, place: Path, folder: str) -> Path:
    """Results in which only the artefact `folder` is missing, the others being links."""
    stage = folder.split("/")[0]
    for found in whole.glob("*/*-????????????"):
        target = place / found.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        if f"{found.parent.name}/{found.name}" != folder and not target.exists():
            target.symlink_to(found)
    (place / stage).mkdir(parents=True, exist_ok=True)
    return place / folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", help="only these")
    parser.add_argument("--place", type=Path, help="default: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        survive(given.place or Path(temporary), given.kills, random.Random(given.seed), given.stages)


def survive(place: Path, kills: int, rng: random.Random, stages: list[str] | None) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parent))
    whole, log = place / "whole", place / "log"
    found = plans(place)
    import importlib

    from moepress.artefacts import task_path

    for stage in {item.stage for item in found.values()}:
        importlib.import_module(f"moepress.stages.{stage}")
    from moepress.report import made

    made.git_commit = lambda: None  # a checkpoint's card names it, and somebody may commit meanwhile
    cost = {}
    for folder in found:
        cost[folder] = undisturbed(task_path(whole, folder), whole / folder, log)
    print(f"{len(found)} artefacts undisturbed in {sum(s for s, _ in cost.values()):.0f} s", flush=True)
    wanted = [folder for folder, item in found.items() if not stages or item.stage in stages]
    told: dict[str, Counter] = {found[folder].stage: Counter() for folder in wanted}
    for number in range(20 * kills):
        if sum(each["kills"] for each in told.values()) >= kills and all(each["kills"] for each in told.values()):
            break
        stage = min(told, key=lambda name: told[name]["kills"])  # as many for each
        folder = rng.choice([folder for folder in wanted if found[folder].stage == stage])
        out = beside(whole, place / f"life-{number}", folder)
        told[stage] += life(rng, task_path(whole, folder), whole / folder, out, log, *cost[folder])
        kills_so_far = sum(each["kills"] for each in told.values())
        print(f"{number + 1} lives, {kills_so_far} kills", file=sys.stderr)
    else:
        raise SystemExit(f"too few kills: {kills} were asked for, and one of each stage; {told}")
    for stage, each in sorted(told.items()):
        print(json.dumps({"stage": stage, **each}))
    print(f"{sum(each['kills'] for each in told.values())} kills survived, every byte as in undisturbed runs")


if __name__ == "__main__":
    main()
