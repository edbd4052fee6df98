"""Prefill and decode times on the device at hand, beside the 16-bit model in the same run."""

import numpy as np
import torch
from tqdm import tqdm

from moepress import latency
from moepress.artefacts import Task, read_json, write_json
from moepress.config import hardware
from moepress.data import sampling
from moepress.inference.checkpoint import fits, load, pick_device
from moepress.models.families import locate


def run(task: Task) -> None:
    config = task.config["latency"]
    here = hardware(task.runtime["device"])
    if config["hardware"] != here:
        raise ValueError(f"latency.hardware={config['hardware']!r}: this machine is {here!r}; set it so, or leave it auto")
    torch.set_num_threads(config["threads"])
    policy = read_json(task.inputs["pruning"] / "policy.json") if "pruning" in task.inputs else None
    device, is_variant = pick_device(task.runtime["device"]), task.inputs["checkpoint"] != task.inputs["model"] or policy
    models = {}
    if fits(task.inputs["model"], device):
        models["16bit"], _ = load(task.inputs["model"], device)
    else:
        print(f"the 16-bit model does not fit in the memory of this machine, so nothing is timed against it ({device})")
    if is_variant:
        models["compressed"], _ = load(task.inputs["checkpoint"], device, pruning=policy, verify=False)

    prompts = real_prompts(task, config["prefill_batch"], config["prefill_len"]).to(device)
    progress = tqdm(total=2 * (config["repeats"] + 1), desc=f"latency {task.name}", unit="round", mininterval=1)
    prefill = latency.compare(models, lambda m: latency.prefill_ms(m, prompts), config["repeats"], progress)
    short = prompts[:1, : max(1, config["prefill_len"] // 4)]
    decode = latency.compare(
        models, lambda m: latency.decode_ms(m, short, config["decode_tokens"]), config["repeats"], progress
    )
    found = {"device": config["hardware"], "threads": config["threads"]}
    found["dtype"] = str(next(iter(models.values())).dtype).removeprefix("torch.") if models else None
    measured = "compressed" if is_variant else "16bit"
    for name, suffix in ((measured, ""), ("16bit", "_16bit")):  # null: not measured, as the model does not fit in memory
        found[f"prefill_ms{suffix}"], found[f"decode_ms{suffix}"] = prefill.get(name), decode.get(name)
        found[f"weight_bytes{suffix}"] = latency.weight_bytes(models[name]) if name in models else None
    for phase, times in (("prefill", prefill), ("decode", decode)):
        is_paired = {"16bit", measured} <= times.keys()
        found[f"speedup_{phase}"] = times["16bit"]["median"] / times[measured]["median"] if is_paired else None
    write_json(task.out / "latency.json", found)


def real_prompts(task: Task, batch: int, length: int) -> torch.Tensor:
    """`[batch, length]` tokens of test text spread over the domains: expert use, and so pruning, depends on real text."""
    model = locate(task.inputs["model"])
    found = sampling.domain_blocks(task.inputs["corpus"], model, "test", length, None, "latency")
    blocks = np.concatenate([blocks for blocks, _ in found.values()])
    if len(blocks) < batch:
        raise ValueError(
            f"latency.prefill_batch={batch} with latency.prefill_len={length}: the test text has {len(blocks)} such windows; "
            "lower them, or give more text"
        )
    return torch.from_numpy(blocks[sampling.spread(len(blocks), batch)])
