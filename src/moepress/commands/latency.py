"""moepress latency latency.model=NAME [KEY=VALUE ...]: how fast a real model's layers are, without its weights."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from moepress import artefacts, dag
from moepress.composing import ROOT
from moepress.config import values
from moepress.machine import check_gpu
from moepress.models import families
from moepress.schema.pruning import is_fitted
from moepress.schema.values import nearest
from moepress.wording import aligned, readable

FOLDER = ROOT / "conf" / "latency" / "models"
HEADINGS = ("phase", "batch x length", "model", "ms", "quartiles", "speed", "must move", "limit", "of the limit", "memory")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str | None) -> dict:
    """The shape of that name, in config.json's words. Raises ValueError naming those that there are."""
    if name not in names():
        of = f"{nearest(name or '', names())}; it is one of {', '.join(names())} (conf/latency/models/)"
        raise ValueError(f"latency.model={name}: no such shape{of}")
    found = artefacts.read_json(FOLDER / f"{name}.json")
    return {key: value for key, value in found.items() if key != "_comment"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress latency",
        description="Time some decoder layers of a real model's shape, with random weights, packed and at 16 bits.",
        epilog=f"latency.model= one of {', '.join(names())}. Also latency.num_layers, latency.skew (Zipf exponent of "
        "how often experts are selected), latency.prefill_batch, .prefill_len, .decode_batch, .decode_len (numbers or lists), "
        "latency.dtype, allocation.bits, allocation=uniform, quantization.group_size, pruning=pesf, device. The result is kept "
        "in paths.results/latency/; asked for again, it is only printed.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as of an experiment")
    config = values(parser.parse_args(arguments).overrides)
    check_gpu(config["device"])
    results = Path(config["paths"]["results"]).expanduser()
    item = planned(config)
    artefacts.write_tasks([item], {item.folder: config}, results)
    artefacts.run_stage(artefacts.task_path(results, item.folder), results / item.folder)
    print("\n".join(lines(artefacts.read_json(results / item.folder / "latency.json"))))
    print(results / item.folder)


def planned(config: dict) -> dag.Artefact:
    """The artefact of a checked configuration. Raises ValueError for what cannot be timed without weights."""
    shape = read(config["latency"]["model"])
    allocation, quantization, pruning = config["allocation"], config["quantization"], config["pruning"]
    if quantization["method"] == "none":
        raise ValueError("quantization=none: the 16-bit layers are timed beside packed ones in any case; leave it out")
    if allocation["budget"] is not None:
        raise ValueError(f"allocation.budget={allocation['budget']}: give allocation.bits, the mean of the experts' widths")
    if not config["latency"]["repeats"]:
        raise ValueError("latency.repeats=0: nothing would be timed; give at least 1")
    if is_fitted(pruning["method"]) and pruning.get("threshold") is None:
        raise ValueError(f"pruning={pruning['method']}: is fitted to real weights; take pesf, or ees with pruning.threshold")
    families.check_group_size(families.shape_of(shape, "latency.model"), quantization["group_size"])
    return dag.shape_artefact(config, shape)


def lines(found: dict) -> Iterator[str]:
    """latency.json of a shape, for a terminal."""
    widths, skew, factor = found["widths"], found["skew"], found["layers_in_all"] / found["num_layers"]
    mix = " and ".join(f"{widths.count(width)} at {width}" for width in sorted(set(widths), reverse=True))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"{found['model']}: {found['num_layers']} of {found['layers_in_all']} layers, random weights; experts: {mix} bits"
    yield f"{found['device']}, {found['threads']} threads, {found['dtype']}; {versions}"
    yield f"measured: {found['bandwidth'] / 1e9:.1f} GB/s, {found['flop_rate'] / 1e9:.4g} GFLOP/s"
    use = f"the busiest expert {skew['busiest']:.2f} times an even share, {100 * skew['unused']:.0f} % of them unused"
    yield f"expert use: Zipf exponent {skew['exponent']:.2f} realised, {use}"
    yield ""
    base = {(row["phase"], row["batch"], row["length"]): row for row in found["rows"] if row["model"] == "16bit"}
    cells: list[tuple[str, ...]] = [(*HEADINGS, f"x {factor:g}")]
    for row in found["rows"]:
        reference = base[row["phase"], row["batch"], row["length"]]
        cells += [cells_of(row, kind, reference, factor) for kind in ("ms", "graph_ms") if row[kind]]
    yield from aligned(cells)
    yield ""
    if factor != 1:
        yield f"x {factor:g}: extrapolated to all {found['layers_in_all']} layers, without embedding and head, not measured."
    if found["rows"][0]["memory_is"] != "peak":
        yield "memory: weights and key-value cache. What a CPU's caches hold may be faster than its memory's limit."


def cells_of(row: dict, kind: str, reference: dict, factor: float) -> tuple[str, ...]:
    """A line of the table. kind: `ms`, or `graph_ms` as a CUDA graph. reference: the 16-bit model's row at this setting."""
    taken, base = row[kind], reference[kind]
    return (
        row["phase"] + (", graph" if kind == "graph_ms" else ""),
        f"{row['batch']} x {row['length']}",
        row["model"],
        f"{taken['median']:.4g}",
        f"{taken['q1']:.4g} to {taken['q3']:.4g}",
        f"{base['median'] / taken['median']:.2f}x" if base else "",
        readable(row["must"]["bytes"]),
        f"{row['limit_ms']:.3g} ms, {row['limited_by']}",
        f"{100 * row['limit_ms'] / taken['median']:.2g} %",
        readable(row["memory_bytes"]),
        f"{factor * taken['median']:.0f} ms",
    )
