"""moepress plan [KEY=VALUE ...]: what an experiment will take, before anything is computed or, for a hub model, downloaded.

moepress plan model=hub model.id=Qwen/Qwen3-30B-A3B allocation.budget=12GiB
"""

import sys
from pathlib import Path

from moepress import estimate, studies
from moepress.config import check_local_text, values
from moepress.forecast import Size, asked_size, memory_of, read_model, size_of
from moepress.machine import hardware
from moepress.models import families
from moepress.models.outline import Outline
from moepress.quantization.budget import Prediction, unpacked_bytes
from moepress.schema.values import WIDTHS, parse_bytes
from moepress.wording import aligned, count, duration, readable

USAGE = """moepress plan [KEY=VALUE ...]: what the experiment `moepress KEY=VALUE ...` will take

Prints, in seconds and without computing anything, the checkpoint's size at each width, the memory, disk and time that the
run needs on this machine, and whether it fits: exit code 0 if it does, 1 if it does not.

  moepress plan model=local model.path=DIR [allocation.budget=12GiB]    DIR with its weights, or only config.json and the index
  moepress plan model=hub model.id=ORG/NAME [allocation.bits=2.5]       fetches those two files, or a lone file's header
  moepress plan                                                         the small default model
"""


def main(arguments: list[str]) -> None:
    """The subcommand; ends the process with 1 where the run does not fit. Raises ValueError for a wrong value."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    text, problems = forecast(arguments)
    print(text)
    if problems:
        sys.exit(f"moepress: does not fit: {'; '.join(problems)}")


def forecast(overrides: list[str]) -> tuple[str, list[str]]:
    """`(table, problems)`: the lines to print, and what this machine lacks for the run."""
    for override in overrides:
        if override.startswith(("-", "study=")):
            raise ValueError(f"{override}: plan takes the KEY=VALUE of one experiment; see moepress plan --help")
    config = values(overrides)
    if config["corpus"]["kind"] == "local":
        check_local_text(config)
    model = read_model(config["model"])
    sizes = []
    if config["quantization"]["method"] != "none":
        families.check_group_size(model.shape, config["quantization"]["group_size"])
        prediction = Prediction(model, config["quantization"])
        sizes = [*uniform_sizes(prediction), asked_size(prediction, config["allocation"])]
    asked = sizes[-1] if sizes else None
    lines = [*describe(model, config), "", *size_table(sizes), *unspent(config["allocation"], sizes)]
    needed, problems = resources(model, config, asked, missing_stages(overrides))
    return "\n".join([*lines, *needed, *([] if problems else ["", "it fits"])]), problems


def uniform_sizes(prediction: Prediction) -> list[Size]:
    shape = prediction.shape
    return [size_of(f"{width} bit", prediction, [[width] * shape.num_experts] * len(shape.moe_layers)) for width in WIDTHS]


def describe(model: Outline, config: dict) -> list[str]:
    """Model, layers, experts, parameters, size at 16 bits."""
    shape, named = model.shape, config["model"]
    name = named.get("id") or named.get("path") or named["name"]
    sparse = len(shape.moe_layers)
    experts = f"{sparse} with {shape.num_experts} experts, {shape.top_k} a token"
    on_disk, loaded = readable(2 * model.num_weights), readable(unpacked_bytes(model, "cpu"))
    routed, active = model.routed_weights / model.num_weights, count(model.active_weights)
    lines = [
        ("model", f"{name} ({shape.family})"),
        ("layers", f"{shape.num_layers}: {shape.num_layers - sparse} dense, {experts}"),
        ("parameters", f"{count(model.num_weights)}: {routed:.1%} in routed experts, {active} active for a token"),
        ("at 16 bits", f"{on_disk} on disk, {loaded} loaded on a CPU (float32)"),
    ]
    if model.is_estimate:
        lines.append(("note", "no weights there: linears outside the experts are an estimate from the index's total size"))
    elif named["kind"] == "tiny":
        lines.append(("note", "the tokenizer's size is an estimate"))
    return [f"{key:11} {text}" for key, text in lines]


def size_table(sizes: list[Size]) -> list[str]:
    """A line for each size."""
    if not sizes:
        return ["quantization=none: nothing is packed", ""]
    rows = [("experts at", "folder", "bits/weight", "loaded on CPU", "on GPU")]
    rows += [(s.label, readable(s.folder), f"{s.bits:.3f}", readable(s.on_cpu), readable(s.on_gpu)) for s in sizes]
    return [*aligned(rows), ""]


def unspent(allocation: dict, sizes: list[Size]) -> list[str]:
    """A note where a budget has room for wider experts than the allocation may give. sizes: first those of WIDTHS."""
    widest = max(allocation.get("widths", WIDTHS))
    if not sizes or allocation["budget"] is None or widest == max(WIDTHS):
        return []
    if parse_bytes(allocation["budget"]) < sizes[WIDTHS.index(widest) + 1].folder:
        return []
    wider = [*allocation["widths"], *(width for width in WIDTHS if width > widest)]
    return [
        f"allocation.budget={allocation['budget']} has room for experts of more than {widest} bits: "
        f"'allocation.widths={wider}' 'statistics.widths={wider}'",
        "",
    ]


def missing_stages(overrides: list[str]) -> set[str] | None:
    """Stages of the experiment with something that is yet to be made; None where its files do not tell."""
    try:
        return studies.experiment(overrides).missing
    except (OSError, ValueError):
        return None


def resources(model: Outline, config: dict, asked: Size | None, missing: set[str] | None) -> tuple[list[str], list[str]]:
    """The lines on memory, disk and time, and what is missing."""
    what, has, memory = memory_of(model, config, asked)
    lacking = [(stage, n) for stage, n in memory.items() if n > has]
    problems = [f"{stage} needs {readable(n)} of {what}, this machine has {readable(has)}" for stage, n in lacking]

    results = Path(config["paths"]["results"]).expanduser()
    disk = estimate.disk(model, config, asked.folder if asked else None)
    total, free = sum(disk.values()), estimate.free_disk(results)
    if total > free:
        problems.append(f"the run needs {readable(total)} of disk, paths.results={results} has {readable(free)} free")

    rows = [(f"{what}, at the most", readable(max(memory.values())), f"of {readable(has)}")]
    rows += [(f"  {stage}", readable(n), "") for stage, n in memory.items()]
    rows += [("disk", readable(total), f"of {readable(free)} free")]
    rows += [(f"  {name}", readable(n), "") for name, n in disk.items()]
    return aligned([*rows, *time_rows(model, config, what != "memory", missing)], left_last=True), problems


def time_rows(model: Outline, config: dict, on_gpu: bool, missing: set[str] | None) -> list[tuple[str, str, str]]:
    """Rows of the table: seconds of the whole and of each row of `estimate.seconds`, at this machine's measured speed. missing:
    see `missing_stages`."""
    speed = estimate.measured_flops()
    results = Path(config["paths"]["results"]).expanduser()
    correction = estimate.correction_from(results, speed, hardware(config["device"]))
    spent = estimate.seconds(model, config, speed, correction or 1.0)
    source = f"at {speed / 1e9:.0f} GFLOP/s, measured on the CPU"
    if correction is not None:
        source += f", and finished quantizations here (x {correction:.2g})"
    elif on_gpu:
        source += "; the GPU is faster"
    done = set() if missing is None else {row for row in spent if not missing & set(row.split(" and "))}
    rows = [("time, roughly", duration(sum(n for row, n in spent.items() if row not in done)), source)]
    return rows + [
        (f"  {row}", "0 s" if row in done else duration(n), "there already" if row in done else "") for row, n in spent.items()
    ]
