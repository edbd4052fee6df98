"""What `moepress plan` foretells against what stages then took: random models of several shapes, one thread.

python benchmarks/prediction.py FOLDER [--shapes wide,narrow,many,middle,finest] [--stages statistics,quantization,...]

Writes the models to FOLDER, runs the real stages, each in a process of its own, and prints for each stage CPU seconds (not the
clock's: they hold on a machine that does other things too; imports are left out on both sides), the most memory, and the bytes
on disk, each as foretold, as measured, and the one over the other. Started again it measures only what is not measured yet.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import SMALL, write_model, write_texts
from moepress import estimate, forecast, plan
from moepress.artefacts import read_json, run_stage, task_path, write_json
from moepress.dag import everything
from moepress.models import limits
from moepress.quantization.budget import Prediction

SHAPES = {
    "wide": {"hidden": 1024, "intermediate": 2048, "experts": 4, "layers": 2},
    "narrow": {"hidden": 384, "intermediate": 768, "experts": 8, "layers": 3},
    "many": {"hidden": 512, "intermediate": 192, "experts": 48, "top_k": 8, "layers": 2},
    "middle": {"hidden": 256, "intermediate": 512, "experts": 16, "layers": 4},
    "finest": {"hidden": 256, "intermediate": 128, "experts": 64, "top_k": 4, "layers": 2},
}
IMPORTS = (
    "transformers.models.mixtral.modeling_mixtral",
    "moepress.forecast",
    "moepress.inference.cpu",
    "moepress.pruning.fitting",
    "moepress.quantization.grid_cpu",
    "moepress.stages.statistics",
    *(f"moepress.stages.{name}" for name in ("corpus", "calibration", "evaluation", "quantization", "decomposition")),
)
"""What stages import, some only when they are at work: a process that has it all is forked for every stage."""
STAGES = ("statistics", "quantization", "decomposition", "pruning")


def overrides(model: Path, texts: Path, results: Path) -> list[list[str]]:
    """Two experiments that have all of the stages together."""
    text = ["corpus=local", f"corpus.path={texts}", "corpus.fractions={train: 0.2, calibration: 0.6, test: 0.2}"]
    sizes = ["calibration.num_sequences=16", "calibration.seq_len=256", "quantization.group_size=64", "latency.repeats=0"]
    common = ["model=local", f"model.path={model}", *text, *SMALL, *sizes, "device=cpu", f"paths.results={results}"]
    return [[*common, "evaluation.decomposition=true", "evaluation.num_blocks=32"], [*common, "pruning=odp"]]


def measure(folder: Path, results: Path) -> dict:
    """One stage in a process of its own: this machine's speed before and after it, CPU seconds without imports, peak memory,
    and the most that its folder held."""
    measured = results / "measured" / f"{folder}.json"
    if measured.is_file():
        return read_json(measured)
    out, most = results / folder, 0
    task, fork = task_path(results, str(folder)), multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(IMPORTS)
    speed = estimate.measured_flops(0.5, clock=time.process_time)
    told = fork.SimpleQueue()
    process = fork.Process(target=run_told, args=(task, out, told))
    process.start()
    while process.is_alive():
        most = max(most, size(out.with_name(f"{out.name}.partial") / "streams"))
        time.sleep(0.05)
    if process.exitcode:
        sys.exit(f"{folder}: failed; python -m moepress.stages {task} {out}")
    speed = (speed + estimate.measured_flops(0.5, clock=time.process_time)) / 2
    known = read_json(out / "provenance.json")
    used = known["cpu_seconds"]
    found = {
        "flops_per_second": speed,
        "seconds": used["total"] - used["startup"],
        "memory": known["peak_memory_bytes"] + told.get(),
        "streams": most,
        "folder": size(out),
    }
    measured.parent.mkdir(parents=True, exist_ok=True)
    write_json(measured, found)
    return found


def run_told(task: Path, out: Path, told) -> None:
    """Tells how many bytes of libraries a fork starts without, which a process that imports them itself has."""
    told.put(mapped(os.getppid()) - mapped(os.getpid()))
    run_stage(task, out)


def mapped(process: int) -> int:
    """Bytes of files in a process's memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))


def size(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_blocks * 512 if path.parent.name == "streams" else path.stat().st_size
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return found


def compare(name: str, place: Path, stages: list[str]) -> list[tuple]:
    """`(model, stage, what, foretold, measured)`"""
    model, results = write_model(place / name, **SHAPES[name]), place / "results" / name
    texts, rows = write_texts(place / "texts", documents=40, words=400), []
    for experiment in overrides(model, texts, results):
        planned = plan.for_overrides(experiment)
        config = next(planned.configs[folder] for folder, item in planned.artefacts.items() if item.stage == "quantization")
        outline = forecast.read_model(config["model"])
        asked = forecast.asked_size(Prediction(outline, config["quantization"]), config["allocation"])
        memory = estimate.memory(outline, config, asked.on_cpu, "cpu", limits.memory_limit())
        disk = estimate.disk(outline, config, asked.folder)
        wanted = everything([item for item in planned.artefacts.values() if item.stage in stages])
        for folder, item in wanted.items():
            found = measure(Path(folder), results)
            seconds = estimate.seconds(outline, config, found["flops_per_second"])
            if item.stage in stages and item.stage in seconds and (name, item.stage, "CPU s") not in [row[:3] for row in rows]:
                rows.append((name, item.stage, "CPU s", seconds[item.stage] - estimate.STARTUP_SECONDS, found["seconds"]))
                rows.append((name, item.stage, "MB", memory[item.stage] / 1e6, found["memory"] / 1e6))
                if item.stage == "quantization":
                    streams = disk["hidden states, while it runs"]
                    rows.append((name, item.stage, "MB of streams", streams / 1e6, found["streams"] / 1e6))
                    (checkpoint,) = (results / folder).rglob("model.safetensors.index.json")
                    packed = sum(p.stat().st_size for p in checkpoint.parent.iterdir() if p.name not in BESIDE)
                    rows.append((name, item.stage, "MB of the folder", asked.folder / 1e6, packed / 1e6))
    return rows


BESIDE = ("provenance.json", "timing.json", "config.yaml", ".snakemake_timestamp")
"""Of a stage, not of the checkpoint."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--stages", default=",".join(STAGES))
    arguments = parser.parse_args()
    speed = estimate.measured_flops(2.0, clock=time.process_time)
    print(f"{speed / 1e9:.0f} GFLOP/s in a CPU second, {os.environ.get('OMP_NUM_THREADS', 'all')} thread")
    print(f"{'model':8} {'stage':14} {'what':17} {'foretold':>9} {'measured':>9}  ratio")
    for name in arguments.shapes.split(","):
        rows = compare(name, arguments.folder.absolute(), arguments.stages.split(","))
        for model, stage, what, foretold, measured in rows:
            print(f"{model:8} {stage:14} {what:17} {foretold:9.1f} {measured:9.1f}  {foretold / measured:5.2f}", flush=True)
