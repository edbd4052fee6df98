"""What an experiment will take, before anything is computed or, for a hub model, downloaded: sizes, memory, disk and time.

moepress plan model=hub model.id=Qwen/Qwen3-30B-A3B allocation.budget=12GiB

Imports no torch, and reads config.json, the index and headers only.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from moepress import estimate, studies
from moepress.config import values
from moepress.machine import hardware, uses_gpu
from moepress.models import families, hub, limits, outline
from moepress.models.outline import Outline
from moepress.quantization.budget import Prediction, plan_budget, unpacked_bytes
from moepress.quantization.size import mixed
from moepress.schema.values import WIDTHS
from moepress.wording import aligned, count, duration, readable

USAGE = """moepress plan [KEY=VALUE ...]: what the experiment `moepress KEY=VALUE ...` will take

Prints, in seconds and without computing anything, the checkpoint's size at each width, the memory, disk and time that the
run needs on this machine, and whether it fits: exit code 0 if it does, 1 if it does not.

  moepress plan model=local model.path=DIR [allocation.budget=12GiB]    DIR with its weights, or only config.json and the index
  moepress plan model=hub model.id=ORG/NAME [allocation.bits=2.5]       fetches those two files, or a lone file's header
  moepress plan                                                         the small default model
"""


@dataclass(frozen=True)
class Size:
    """A checkpoint at some widths: bytes of its folder and of the loaded model, bits per weight on disk."""

    label: str
    folder: int
    bits: float
    on_cpu: int
    on_gpu: int


def main(arguments: list[str]) -> None:
    """The subcommand; ends the process with 0 if the run fits, 1 if it does not or a value is wrong."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    try:
        text, problems = forecast(arguments)
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    print(text)
    if problems:
        sys.exit(f"moepress: does not fit: {'; '.join(problems)}")


def forecast(overrides: list[str]) -> tuple[str, list[str]]:
    """`(table, problems)`: what there is to say, and what the machine at hand lacks for it."""
    for override in overrides:
        if override.startswith(("-", "study=")):
            raise ValueError(f"{override}: plan takes the KEY=VALUE of one experiment; see moepress plan --help")
    config = values(overrides)
    model = read_model(config["model"])
    sizes = []
    if config["quantization"]["method"] != "none":
        families.check_group_size(model.shape, config["quantization"]["group_size"])
        prediction = Prediction(model, config["quantization"])
        sizes = [*uniform_sizes(prediction), asked_size(prediction, config["allocation"])]
    asked = sizes[-1] if sizes else None
    lines = [*describe(model, config), "", *size_table(sizes)]
    needed, problems = resources(model, config, asked, missing_stages(overrides))
    return "\n".join([*lines, *needed, *([] if problems else ["", "it fits"])]), problems


def read_model(model: dict, local: bool = False) -> Outline:
    """The outline of the model that the group `model` names. local: of a hub model only what is here, without network."""
    if model["kind"] == "tiny":
        return outline.from_recipe(model)
    if model["kind"] == "carved":
        return outline.from_carving(model)
    if model["kind"] == "hub":
        folder, stored = hub.fetch_sizes(model["id"], model["revision"], local)
        return outline.from_headers(folder, "model.id", stored) if stored else outline.read_any(folder, "model.id")
    return outline.read_any(Path(model["path"]), "model.path")


def uniform_sizes(prediction: Prediction) -> list[Size]:
    shape = prediction.shape
    return [size_of(f"{width} bit", prediction, [[width] * shape.num_experts] * len(shape.moe_layers)) for width in WIDTHS]


def asked_size(prediction: Prediction, allocation: dict) -> Size:
    """The size under the configuration's own allocation. Rules that read statistics decide later which expert gets which width;
    here any widths that fill the budget stand for theirs."""
    sizes, total = plan_budget(allocation, prediction)
    shape, layers = prediction.shape, len(prediction.shape.moe_layers)
    each = mixed(sizes, total, layers * shape.num_experts, mixes=allocation["method"] != "uniform")
    bits = [each[layer * shape.num_experts : (layer + 1) * shape.num_experts] for layer in range(layers)]
    goal = allocation["budget"] or f"{allocation['bits']:g} bit"
    return size_of(f"{allocation['method']} {goal} (asked, {sum(each) / len(each):.2f} bit)", prediction, bits)


def size_of(label: str, prediction: Prediction, bits: list[list[int]]) -> Size:
    on_disk = 8 * prediction.weight_bytes(bits) / prediction.outline.num_weights
    loaded = [prediction.loaded_bytes(bits, device) for device in ("cpu", "cuda")]
    return Size(label, prediction.folder_bytes(bits), on_disk, *loaded)


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


def memory_of(model: Outline, config: dict, asked: Size | None) -> tuple[str, int, dict[str, int]]:
    """`(what, has, needed)`: which memory the stages run in, its bytes on this machine, and stage -> bytes at its peak."""
    gpu = estimate.gpu_memory() if uses_gpu(config["device"]) else None
    what, has = ("memory", limits.memory_limit()) if gpu is None else ("GPU memory", gpu)
    packed = 0 if asked is None else asked.on_cpu if gpu is None else asked.on_gpu
    return what, has, estimate.memory(model, config, packed, "cpu" if gpu is None else "cuda", has)


def check_memory(config: dict) -> None:
    """ValueError where the packed model is to be tuned as a whole and this machine lacks the memory for that. Asks no network:
    a hub model of which nothing is here yet is checked by the stage itself."""
    if not (steps := config["quantization"].get("distill_steps")):
        return
    try:
        model = read_model(config["model"], local=True)
    except (OSError, ValueError):
        return
    asked = asked_size(Prediction(model, config["quantization"]), config["allocation"])
    what, has, needed = memory_of(model, config, asked)
    if needed["quantization"] > has:
        raise ValueError(
            f"quantization.distill_steps={steps}: tuning the packed model as a whole needs {readable(needed['quantization'])} "
            f"of {what}, this machine has {readable(has)}; take experiment=fast, which never holds more than a layer"
        )


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
