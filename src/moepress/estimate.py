"""What a run will need of a machine: memory, disk and time, from an outline and a configuration. Imports no torch.

Memory and disk follow the code that they are named after. Time is the arithmetic that work.py counts, divided by what this
machine is measured to do; where the results folder holds finished quantizations, their own times correct it.

Legend: T calibration tokens, H hidden size, I intermediate size, E experts, K selected experts, V vocabulary.
"""

import shutil
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path

from moepress import work
from moepress.artefacts import read_config, read_json
from moepress.dag import distill_sequences, is_decomposed, is_diverged
from moepress.integrity import PROVENANCE
from moepress.models import outline as outlines
from moepress.models.dialects import standard_config
from moepress.models.families import FAMILIES, in_layer, kind_of
from moepress.models.folders import locate
from moepress.models.limits import TOKENS_AT_ONCE, curvature_bytes, experts_at_once, kept_bytes
from moepress.models.outline import Outline
from moepress.quantization.budget import Prediction, unpacked_bytes
from moepress.schema.allocation import reads_gradients, reads_statistics
from moepress.schema.pruning import is_fitted

LIBRARY_BYTES = 700 << 20
"""Of a stage that has torch and transformers in memory and no model yet."""
STARTUP_SECONDS = 8.0
STEP_SECONDS = 8e-5
"""Of one column of GPTQ's loop beside its arithmetic: some ten calls of torch, measured on one matrix of 512 x 512."""
FOLDER_SECONDS = 0.4
"""Of transformers' and our own code around a whole model: built and loaded, or its packed folder finished, with a card."""
COMPILED_SECONDS = 0.4
"""To load what numba has compiled, at its first call: the grid search, and the unpacking of experts."""
READ_BYTES_PER_SECOND = 5e8


def has_statistics(config: dict) -> bool:
    return config["quantization"]["method"] != "none" and reads_statistics(config["allocation"])


def has_gradients(config: dict) -> bool:
    return config["quantization"]["method"] != "none" and reads_gradients(config["allocation"])


def gradient_tokens(config: dict) -> int:
    return min(config["gradients"]["num_sequences"], config["calibration"]["num_sequences"]) * config["calibration"]["seq_len"]


def memory(model: Outline, config: dict, packed_bytes: int, device: str, has: int) -> dict[str, int]:
    """Stage -> bytes at its peak, of RAM on "cpu", of the GPU on "cuda". packed_bytes: of the packed model, loaded. has: bytes
    that there are; a 16-bit model beyond them is evaluated a layer at a time, and nothing is timed against it.

    Of mapped files, whose pages the system drops where memory is short, only a layer's experts are counted.
    """
    shape, quantized = model.shape, config["quantization"]["method"] != "none"
    H, I, E = shape.hidden_size, shape.intermediate_size, shape.num_experts
    T = config["calibration"]["num_sequences"] * config["calibration"]["seq_len"]
    library = LIBRARY_BYTES if device == "cpu" else 0
    activations = 8 * H + 4 * I + running(model)
    layer = library + 2 * E * model.expert_weights + 12 * T * E + 4 * min(T, TOKENS_AT_ONCE) * activations
    experts = experts_at_once(H, I, E) * (curvature_bytes(max(H, I)) + 3 * 4 * 2 * I * H)  # and a weight's three copies
    linears = curvature_bytes(widest_linear(model))
    found = {}
    if has_statistics(config):
        slots = T * shape.top_k * experts_at_once(H, I, E) // E
        found["statistics"] = layer + experts + kept_bytes(slots, I, len(config["statistics"]["widths"]))
    if has_gradients(config):  # a layer's activations are kept for its backward
        kept = 4 * min(T, TOKENS_AT_ONCE) * (24 * H + 8 * shape.top_k * I) + 4 * 3 * 4 * 2 * I * H
        found["gradients"] = layer + max(kept, 3 * 4 * config["calibration"]["seq_len"] * shape.vocab_size)
    if quantized:
        found["quantization"] = layer + max(experts, linears)
        if config["quantization"].get("distill_steps"):
            a_step = max(config["quantization"]["tune_tokens"], config["calibration"]["seq_len"])
            tuning = Prediction(model, config["quantization"]).tuning_bytes(a_step)
            found["quantization"] = max(found["quantization"], layer + packed_bytes + tuning)
    logits = 3 * 4 * config["evaluation"]["batch_size"] * config["evaluation"]["seq_len"] * shape.vocab_size
    original = unpacked_bytes(model, device)
    is_whole = library + 1.1 * original < has  # as inference/checkpoint.py's `fits`
    found["evaluation at 16 bits"] = (library + original if is_whole else layer) + logits
    if quantized:
        found["evaluation"] = library + packed_bytes + logits
    if is_fitted(config["pruning"]["method"]):  # whole, as it is loaded
        found["pruning"] = library + (packed_bytes if quantized else original) + 4 * TOKENS_AT_ONCE * activations
    if is_diverged(config):  # the 16-bit model a layer at a time, then the other one, and the logits of both
        found["divergence"] = max(layer, library + (packed_bytes if quantized else original) + 2 * logits)
    if is_decomposed(config):  # one model after the other: what the first leaves, and the second's files as they are read
        found["decomposition"] = (
            max(found["evaluation"], found["evaluation at 16 bits"]) + packed_bytes + model.nbytes * is_whole
        )
    found["latency"] = library + original * is_whole + (packed_bytes if quantized else 0)
    return found


def running(model: Outline) -> int:
    """Activations of one token in linear attention, of the layer with the widest: its chunks take some five copies of what is
    projected, as measured at Qwen3-Next's sizes."""
    linear, rows = FAMILIES[model.shape.family].attention[1:], Counter[str]()
    for name, entry in model.tensors.items():
        if len(entry.shape) == 2 and (in_layer(name) or "").startswith(linear):
            rows[name.split(".")[2]] += entry.shape[0]
    return 5 * max(rows.values(), default=0)


def widest_linear(model: Outline) -> int:
    """Inputs of the widest linear outside the experts; from config.json where the shapes are estimated."""
    config, family = standard_config(model.config, "model"), FAMILIES[model.shape.family]
    if not model.is_estimate:
        linears = ((name, entry.shape) for name, entry in model.tensors.items() if len(entry.shape) == 2)
        return max(size[1] for name, size in linears if kind_of(family, name, size, 8) in ("attention", "shared"))
    heads = config.get("num_attention_heads", 1)
    head = config.get("v_head_dim") or config.get("head_dim") or model.shape.hidden_size // heads
    return max(model.shape.hidden_size, heads * head, config.get("intermediate_size", 0))


def disk(model: Outline, config: dict, folder_bytes: int | None) -> dict[str, int]:
    """What -> bytes under paths.results at the most. folder_bytes: of the packed folder."""
    calibration, streams = config["calibration"], 0
    if has_statistics(config):
        streams = 3  # a layer's input, its output and its block's input; see models/streams.py
    if config["quantization"]["method"] in ("gptq", "qesc"):
        streams = 6  # the same of the quantized model
        streams += config["quantization"]["tune_steps"] > 0  # and what a layer is tuned towards
        sample = distill_sequences(config)
        streams += 3 * (sample or 0) / calibration["num_sequences"]  # and of the larger sample, through the 16-bit model
    each = 4 * calibration["num_sequences"] * calibration["seq_len"] * model.shape.hidden_size
    found = {"hidden states, while it runs": int(streams * each)}
    if has_gradients(config):
        each = gradient_tokens(config) * model.shape.hidden_size
        found["gradients"] = 2 * len(model.shape.moe_layers) * each
        found["hidden states of the gradients, while it runs"] = 4 * (model.shape.num_layers + 4) * each
    if folder_bytes is not None:
        found["packed folder"] = folder_bytes
    if config["model"]["kind"] in ("tiny", "carved"):
        found["16-bit model"] = model.nbytes
    return found


def seconds(model: Outline, config: dict, flops_per_second: float, correction: float = 1.0) -> dict[str, float]:
    """Row -> seconds; a row is a stage, or several whose names are joined by " and ". correction: of statistics and
    quantization, see `correction_from`."""
    found = {"model": model_seconds(model, config, flops_per_second)}
    method, settings = config["quantization"]["method"], config["quantization"]
    if has_gradients(config):  # forward, forward again, its experts once more, backward
        flops = 4 * work.forward_flops(model, gradient_tokens(config), config["calibration"]["seq_len"])
        found["gradients"] = flops / flops_per_second
    if has_statistics(config):
        flops, steps = work.statistics_work(model, config)
        found["statistics"] = correction * (flops / flops_per_second + STEP_SECONDS * steps) + COMPILED_SECONDS
    if method != "none":
        flops, steps = work.quantization_work(model, config["calibration"], settings)
        found["quantization"] = (
            correction * (flops / flops_per_second + STEP_SECONDS * steps) + FOLDER_SECONDS + 2 * COMPILED_SECONDS
        )
    if is_fitted(config["pruning"]["method"]):
        found["pruning"] = work.pruning_flops(model, config) / flops_per_second + FOLDER_SECONDS
    if is_diverged(config):
        found["divergence"] = work.divergence_flops(model, config) / flops_per_second + FOLDER_SECONDS
    if is_decomposed(config):
        flops, steps = work.decomposition_work(model, config)
        found["decomposition"] = flops / flops_per_second + STEP_SECONDS * steps + 2 * FOLDER_SECONDS
    once = work.measurement_flops(model, config, is_packed=False)
    found["evaluation and latency"] = sum(once) / flops_per_second
    if method != "none":
        found["evaluation and latency"] += sum(work.measurement_flops(model, config, is_packed=True)) / flops_per_second
    jobs = {"evaluation and latency": 2 if method == "none" else 4}
    return {stage: value + STARTUP_SECONDS * jobs.get(stage, 1) for stage, value in found.items()}


def model_seconds(model: Outline, config: dict, flops_per_second: float) -> float:
    """Training the small model, carving a dense one, or reading and hashing a given one."""
    if config["model"]["kind"] == "carved":
        return work.carving_flops(model, config["model"]) / flops_per_second
    if config["model"]["kind"] != "tiny":
        return 2 * model.nbytes / READ_BYTES_PER_SECOND
    training = config["model"]["training"]
    tokens = training["steps"] * training["batch_size"] * training["seq_len"]
    return 6 * 2 * tokens * model.active_weights / flops_per_second  # a small model reaches about half of a matrix product's


def measured_flops(duration: float = 0.5, clock=time.perf_counter) -> float:
    """Floating-point operations in a second of float32 matrix products on this machine's CPU."""
    import numpy as np

    size = 1024
    a = np.ones((size, size), np.float32)
    a @ a
    count, start = 0, clock()
    while (taken := clock() - start) < duration:
        a @ a
        count += 1
    return 2 * size**3 * count / taken


def correction_from(results: Path, flops_per_second: float, device: str) -> float | None:
    """Seconds that the quantizations of these results took on this device over those that are estimated for them: the median of
    the newest ten, None without any."""
    finished = sorted(results.glob("quantization/*/timing.json"), key=lambda path: -path.stat().st_mtime)[:10]
    ratios = []
    for path in finished:
        try:
            provenance, folder = read_json(path.parent / PROVENANCE), path.parent
            if provenance["device"] != device:
                continue
            inputs = provenance["inputs"]
            model = outlines.read(locate(results / "model" / inputs["model"]), "model")
            calibration = {}
            if "calibration" in inputs:
                calibration = read_config(results / "calibration" / inputs["calibration"])["calibration"]
            flops, steps = work.quantization_work(model, calibration, read_config(folder)["quantization"])
            ratios.append(read_json(path)["quantize_seconds"] / (flops / flops_per_second + STEP_SECONDS * steps))
        except (OSError, ValueError, KeyError, ZeroDivisionError):  # a folder whose model has gone, or of another version
            continue
    return statistics.median(ratios) if ratios else None


def gpu_memory() -> int | None:
    """Bytes of the first GPU's memory, None where nvidia-smi tells none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    return int(lines[0]) << 20 if lines[0].strip().isdigit() else None


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
