"""Prefill and decode times on the device at hand, beside the 16-bit model in the same run."""

import numpy as np
import torch
from tqdm import tqdm

from moepress import latency
from moepress.artefacts import Task, read_json, write_json
from moepress.config import hardware
from moepress.data import sampling
from moepress.inference.checkpoint import load
from moepress.models.families import locate


def run(task: Task) -> None:
    config = task.config["latency"]
    here = hardware(task.runtime["device"])
    if config["hardware"] != here:
        raise ValueError(f"latency.hardware={config['hardware']!r}: this machine is {here!r}; set it so, or leave it auto")
    torch.set_num_threads(config["threads"])
    policy = read_json(task.inputs["pruning"] / "policy.json") if "pruning" in task.inputs else None
    reference, _ = load(task.inputs["model"], task.runtime["device"])
    models = {"16bit": reference}
    if task.inputs["checkpoint"] != task.inputs["model"] or policy:
        models["compressed"], _ = load(task.inputs["checkpoint"], task.runtime["device"], pruning=policy)

    prompts = real_prompts(task, config["prefill_batch"], config["prefill_len"]).to(reference.device)
    progress = tqdm(total=2 * (config["repeats"] + 1), desc=f"latency {task.name}", unit="round", mininterval=1)
    prefill = latency.compare(models, lambda m: latency.prefill_ms(m, prompts), config["repeats"], progress)
    short = prompts[:1, : max(1, config["prefill_len"] // 4)]
    decode = latency.compare(
        models, lambda m: latency.decode_ms(m, short, config["decode_tokens"]), config["repeats"], progress
    )
    measured = "compressed" if "compressed" in models else "16bit"
    write_json(
        task.out / "latency.json",
        {
            "device": config["hardware"],
            "threads": config["threads"],
            "dtype": str(reference.dtype).removeprefix("torch."),
            "prefill_ms": prefill[measured],
            "decode_ms": decode[measured],
            "prefill_ms_16bit": prefill["16bit"],
            "decode_ms_16bit": decode["16bit"],
            "speedup_prefill": prefill["16bit"]["median"] / prefill[measured]["median"],
            "speedup_decode": decode["16bit"]["median"] / decode[measured]["median"],
            "weight_bytes": latency.weight_bytes(models[measured]),
            "weight_bytes_16bit": latency.weight_bytes(reference),
        },
    )


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
