"""The figures that the default study must reach, from its results:  python benchmarks/study_figures.py results

Prints each with what was measured: order of the methods (paired over the same blocks), bytes against prediction, time and
memory by stage, the share of process start-up.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def newest_report(results: Path, study: str = "default") -> Path:
    return max(results.glob(f"report/{study}-*"), key=lambda folder: folder.stat().st_mtime)


def paired(results: Path, keys: dict, other: dict) -> tuple[float, float]:
    """Mean difference of the nll per block of two runs and its standard error."""
    tables = [pd.read_parquet(next(results.glob(f"evaluation/*-{k['evaluation']}")) / "blocks.parquet") for k in (keys, other)]
    difference = tables[0]["nll"] - tables[1]["nll"]
    return difference.mean(), difference.sem()


def order_of_methods(results: Path) -> None:
    runs = pd.read_csv(newest_report(results) / "runs.csv")
    plain = runs[runs["pruning"] == "none"].assign(keys=lambda t: t["keys"].map(json.loads))
    for (allocation, bits), group in plain[plain["method"] != "none"].groupby(["allocation", "bits_nominal"]):
        by_method = group.set_index("method")
        for better, worse in (("gptq", "rtn"), ("qesc", "gptq")):
            if {better, worse} <= set(by_method.index):
                a, b = by_method.loc[better], by_method.loc[worse]
                mean, error = paired(results, a["keys"], b["keys"])
                print(
                    f"{allocation} {bits:g} bits: {better} - {worse} nll {mean:+.4f} +- {error:.4f}, perplexity "
                    f"{a['ppl_mean']:.3f} against {b['ppl_mean']:.3f}, selection shift "
                    f"{a['selection_shift']:.4f} against {b['selection_shift']:.4f}"
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
