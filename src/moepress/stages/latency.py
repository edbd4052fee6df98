"""Prefill and decode times on the device at hand, beside the 16-bit model in the same run: of a checkpoint, or of layers of a
real model's shape with random weights."""

import numpy as np
import torch
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.data import sampling
from moepress.inference.checkpoint import fits, load, pick_device
from moepress.latency import device as devices
from moepress.latency import measuring, shapes
from moepress.latency.traffic import weight_bytes
from moepress.machine import hardware
from moepress.models.folders import locate
from moepress.schema.values import parse_bytes


def run(task: Task) -> None:
    config = task.config["latency"]
    here = hardware(task.runtime["device"])
    if config["hardware"] != here:
        raise ValueError(
            f"latency.hardware={config['hardware']!r}: this machine is {here!r}, and times are kept under its name; give "
            f"latency.hardware={here!r} (auto is the machine where the command runs, not a cluster's), or latency.repeats=0"
        )
    torch.set_num_threads(config["threads"])
    device = pick_device(task.runtime["device"])
    models, texts, facts = layers_of_a_shape(task, device) if config.get("model") else checkpoints(task, device)
    rates = device_rates(models, config, device)
    total = measuring.rounds(config) if models else 0
    with tqdm(total=total, desc=f"latency {task.name}", unit="round", mininterval=1) as progress:
        rows = measuring.measure(models, texts, config, progress) if models else []
    again = device_rates(models, config, device)
    rates = {name: max(rate, again[name]) for name, rate in rates.items()}
    rows = measuring.with_limits(rows, **rates) if rows else []
    write_json(task.out / "latency.json", summary(task, models, rows) | rates | facts)


def device_rates(models: list[measuring.Variant], config: dict, device: str) -> dict[str, float]:
    """What the device can do at this moment, both before and after the timing: on a machine that others use, the better
    counts."""
    dtype = models[0].model.dtype if models else torch.float32
    bandwidth = devices.bandwidth(device, parse_bytes(config["buffer"], "latency.buffer"))
    return {"bandwidth": bandwidth, "flop_rate": devices.flop_rate(device, dtype)}


def checkpoints(task: Task, device: str) -> tuple[list[measuring.Variant], dict[str, torch.Tensor], dict]:
    """The checkpoint with its policy and the 16-bit model, on test text."""
    config, dtype = task.config["latency"], dtype_of(task.config["latency"])
    policy = read_json(task.inputs["pruning"] / "policy.json") if "pruning" in task.inputs else None
    original = compressed = None
    if fits(task.inputs["model"], device, dtype):
        original, _ = load(task.inputs["model"], device, dtype, verify=False)  # compared when the stage began
    else:
        print(f"the 16-bit model does not fit in the memory of this machine, so nothing is timed against it ({device})")
    if task.inputs["checkpoint"] != task.inputs["model"]:
        compressed, _ = load(task.inputs["checkpoint"], device, dtype, verify=False)
    elif policy:
        compressed = original
    models = measuring.variants(original, compressed, policy, device)
    texts = {phase: real_prompts(task, phase, config) for phase in ("prefill", "decode")} if models else {}
    return models, texts, {}


def dtype_of(config: dict) -> torch.dtype | None:
    return None if config["dtype"] == "auto" else getattr(torch, config["dtype"])


def real_prompts(task: Task, phase: str, config: dict) -> torch.Tensor:
    """`[batch, length]` tokens of test text spread over the domains: expert use, and so pruning, depends on real text."""
    batch, length = max(config[f"{phase}_batch"]), max(config[f"{phase}_len"])
    length += config["decode_tokens"] if phase == "decode" else 0
    model = locate(task.inputs["model"])
    found = sampling.domain_blocks(task.inputs["corpus"], model, "test", length, None, "latency")
    blocks = np.concatenate([blocks for blocks, _ in found.values()])
    if len(blocks) < batch:
        raise ValueError(
            f"latency.{phase}_batch={batch} with latency.{phase}_len={max(config[f'{phase}_len'])}: the test text has "
            f"{len(blocks)} such windows; lower them, or give more text"
        )
    return torch.from_numpy(blocks[sampling.spread(len(blocks), batch)])


def layers_of_a_shape(task: Task, device: str) -> tuple[list[measuring.Variant], dict[str, torch.Tensor], dict]:
    """A real shape's layers at 16 bits and packed, and random tokens, which select experts with the skew that is asked for."""
    from moepress.latency import building

    config, sizes, shape = task.config["latency"], task.config["quantization"], task.config["shape"]
    dtype = dtype_of(config) or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    layers = shapes.layers_only(shape, config["num_layers"], building.VOCAB)
    building.check_memory(layers, dtype, device)
    widths = shapes.widths(shape, task.config["allocation"], sizes["group_size"])
    original, compressed = (building.build(layers, dtype, device, found, sizes) for found in (None, widths))
    routing, _ = (building.SkewedRouting(model, config["skew"]) for model in (original, compressed))
    policy = None if task.config["pruning"]["method"] == "none" else task.config["pruning"]
    generator = torch.Generator().manual_seed(0)
    texts = {}
    for phase, more in (("prefill", 0), ("decode", config["decode_tokens"])):
        size = (max(config[f"{phase}_batch"]), max(config[f"{phase}_len"]) + more)
        texts[phase] = torch.randint(building.VOCAB, size, generator=generator)
    counts = routing.counts(texts["prefill"])
    facts = {"model": config["model"], "num_layers": config["num_layers"], "widths": widths}
    facts |= {"layers_in_all": shapes.layers_in_all(shape), "skew": building.realised(counts.numpy())}
    return measuring.variants(original, compressed, policy, device), texts, facts


def summary(task: Task, models: list[measuring.Variant], rows: list[dict]) -> dict:
    """latency.json: the machine; of each phase's first setting the model that was asked for and the 16-bit one, as runs.csv
    shows them (null: not measured, as the model does not fit in memory); and all rows."""
    config, loaded = task.config["latency"], {variant.name: variant.model for variant in models}
    is_variant = config.get("model") or task.inputs["checkpoint"] != task.inputs["model"] or "pruning" in task.inputs
    measured = "compressed" if is_variant else "16bit"
    found = {"device": config["hardware"], "threads": config["threads"], "versions": devices.versions()}
    found["dtype"] = str(models[0].model.dtype).removeprefix("torch.") if models else None
    for phase in ("prefill", "decode"):
        own, base = measuring.headline(rows, phase, (measured, "16bit"))
        found[f"{phase}_ms"], found[f"{phase}_ms_16bit"] = (row and row["ms"] for row in (own, base))
        found[f"speedup_{phase}"] = base["ms"]["median"] / own["ms"]["median"] if own and base else None
        found[f"share_{phase}"] = own and own["limit_ms"] / own["ms"]["median"]
    for name, suffix in ((measured, ""), ("16bit", "_16bit")):
        found[f"weight_bytes{suffix}"] = weight_bytes(loaded[name]) if name in loaded else None
    return found | {"measured": measured, "rows": rows}
