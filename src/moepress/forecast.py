"""What an experiment will take of a machine, from its configuration and the model's headers alone: sizes and memory.

Imports no torch, and reads config.json, the index and headers only. `moepress plan` (commands/plan.py) shows it; a run asks it
what its jobs need, and is refused by it before any work.
"""

from dataclasses import dataclass
from pathlib import Path

from moepress import estimate
from moepress.machine import uses_gpu
from moepress.models import hub, limits, outline
from moepress.models.outline import Outline
from moepress.quantization.budget import Prediction, plan_budget
from moepress.quantization.size import mixed
from moepress.wording import readable


@dataclass(frozen=True)
class Size:
    """A checkpoint at some widths: bytes of its folder and of the loaded model, bits per weight on disk."""

    label: str
    folder: int
    bits: float
    on_cpu: int
    on_gpu: int


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
