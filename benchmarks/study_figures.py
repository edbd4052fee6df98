"""The figures that the default study must reach, from its results:  python benchmarks/study_figures.py results

Prints each with what was measured: order of the methods (paired over the same blocks of the corpus's domains), bytes against
prediction, time and memory by stage, the share of process start-up.
"""

import json
import math
import sys
from pathlib import Path

import pandas as pd

from moepress.report import paired, reading
from moepress.report.table import mean_over_domains


def newest_report(results: Path, study: str = "default") -> Path:
    return max(results.glob(f"report/{study}-*"), key=lambda folder: folder.stat().st_mtime)


def order_of_methods(results: Path) -> None:
    for pair in paired.pairs(reading.of_report(newest_report(results))):
        if pair.step != "quantization":
            continue
        one, (run, other) = pair.differences["nll"], (pair.runs[0], pair.others[0])
        ppl, other_ppl = (math.exp(mean_over_domains(each.blocks, run.domains[0])[0]) for each in (run, other))
        print(
            f"{run.title} - {pair.against}: nll {one.value:+.4f} +- {one.stderr:.4f}, perplexity {ppl:.3f} against "
            f"{other_ppl:.3f}, selection shift {run.metrics['selection_shift']:.4f} against "
            f"{other.metrics['selection_shift']:.4f}"
        )


def sizes(results: Path) -> None:
    for folder in sorted(results.glob("quantization/*-????????????")):
        inputs = json.loads((folder / "provenance.json").read_text())["inputs"]
        predicted = json.loads((results / "allocation" / inputs["allocation"] / "allocation.json").read_text())
        measured = json.loads((folder / "size.json").read_text())
        off = measured["bits_effective"] / predicted["predicted_bits_effective"] - 1
        print(f"{folder.name}: bits_effective {measured['bits_effective']:.4f}, {off:+.2%} of what the format needs")


def costs(results: Path) -> None:
    rows = []
    for path in results.glob("*/*-????????????/provenance.json"):
        found = json.loads(path.read_text())
        cpu = found["cpu_seconds"]
        memory = found["peak_memory_bytes"] / 2**20
        rows.append((found["stage"], found["seconds"], cpu["startup"], cpu["total"], memory))
    table = pd.DataFrame(rows, columns=["stage", "seconds", "startup_cpu", "cpu", "peak_MiB"])
    by_stage = table.groupby("stage").agg(
        jobs=("seconds", "size"),
        seconds=("seconds", "sum"),
        startup_cpu=("startup_cpu", "sum"),
        cpu=("cpu", "sum"),
        peak_MiB=("peak_MiB", "max"),
    )
    print(by_stage.round(1).to_string())
    print(f"process start-up: {table['startup_cpu'].sum() / table['cpu'].sum():.1%} of the CPU time of all stages")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    order_of_methods(place)
    sizes(place)
    costs(place)
