"""Peak memory of quantizing a checkpoint that is larger than what it may take: a random Mixtral with layers of the real size.

python benchmarks/memory.py FOLDER [--layers 4] [OVERRIDES...]

Writes the checkpoint (12.1 GB with 4 layers of hidden 4096, FFN 14336, 8 experts, bf16) to FOLDER/model, some text to
FOLDER/texts, runs the real DAG up to the packed checkpoint in FOLDER/results, and samples the stage's memory twice a second.
Leaves FOLDER/memory.csv, memory.png and memory.json. Stopped and started again it goes on; the trace is appended.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from moepress.composing import ROOT
from moepress.studies import experiment

H, I, E, VOCAB, HEADS, KV_HEADS = 4096, 14336, 8, 32000, 32, 8


def write_checkpoint(folder: Path, layers: int) -> None:
    """A random Mixtral-8x7B with fewer layers, a shard per layer; what is whole is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors" for i in range(layers + 1)]
    where = {}
    for index, file in enumerate(tqdm(names, desc="writing the checkpoint", unit="shard")):
        generator = torch.Generator().manual_seed(index)

        def weight(*shape, generator=generator):
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

        sizes = {"model.embed_tokens.weight": (VOCAB, H), "lm_head.weight": (VOCAB, H), "model.norm.weight": (H,)}
        if index < layers:
            at, kv = f"model.layers.{index}", KV_HEADS * H // HEADS
            sizes = {f"{at}.self_attn.{n}_proj.weight": (kv if n in "kv" else H, H) for n in "qkvo"}
            sizes |= {f"{at}.{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
            sizes[f"{at}.block_sparse_moe.gate.weight"] = (E, H)
            for e in range(E):
                matrices = {"w1": (I, H), "w3": (I, H), "w2": (H, I)}
                sizes |= {f"{at}.block_sparse_moe.experts.{e}.{n}.weight": size for n, size in matrices.items()}
        where |= dict.fromkeys(sizes, file)
        if not (folder / file).is_file():
            tensors = {n: torch.ones(s, dtype=torch.bfloat16) if "norm" in n else weight(*s) for n, s in sizes.items()}
            save_file(tensors, folder / "new", {"format": "pt"})
            (folder / "new").replace(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": VOCAB, "hidden_size": H}
    config |= {"intermediate_size": I, "num_hidden_layers": layers, "num_attention_heads": HEADS, "dtype": "bfloat16"}
    config |= {
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": E,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_texts(folder: Path, tokenizer_folder: Path) -> None:
    """Random words, and a byte-level tokenizer for them."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubcdfgklmnprst"), rng.integers(2, 9))) for _ in range(2000)]
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(rng.choice(words, 400)) for _ in range(200)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))


def stages_running(results: Path) -> dict[int, str]:
    """Process id -> stage of the jobs that fill a results folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"moepress.stages" in words and b"python" in words[0]:
            task = Path(words[words.index(b"moepress.stages") + 1].decode())
            if task.is_relative_to(results):
                found[int(path.parent.name)] = task.parent.name
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of a process: all, its own, and pages of mapped files (which the system takes back when it needs them)."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return {}
    kinds = {"resident": "VmRSS", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in kinds.items() if key in lines}


def draw(rows: list[dict], bound: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["stage"] in ("statistics", "quantization")]
    minutes = [float(row["seconds"]) / 60 for row in rows]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for name, label in (
        ("resident", "resident"),
        ("own", "of it the process's own"),
        ("mapped", "of it pages of mapped files"),
    ):
        axes.plot(minutes, [float(row[name]) / 1e9 for row in rows], label=label, lw=1)
    axes.axhline(bound / 1e9, color="black", ls="--", lw=1, label="1.5 x one float32 decoder layer + activations")
    axes.set(xlabel="minutes", ylabel="GB", ylim=(0, None), title=f"{rows[0]['stage']}, a 12 GB Mixtral")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, help="of the stage; on a shared machine one can be faster than two")
    parser.add_argument("--target", default="quantization", choices=["statistics", "quantization"])
    arguments, overrides = parser.parse_known_args()
    folder = arguments.folder.resolve()
    write_checkpoint(folder / "model", arguments.layers)
    write_texts(folder / "texts" / "words", folder / "model")
    sequences, seq_len = 4, 128
    overrides = ["quantization=qesc", "allocation=uniform", "allocation.bits=2", *overrides]
    overrides = ["model=local", f"model.path={folder / 'model'}", "corpus=local", f"corpus.path={folder / 'texts'}", *overrides]
    overrides += [
        f"calibration.num_sequences={sequences}",
        f"calibration.seq_len={seq_len}",
        f"paths.results={folder / 'results'}",
    ]
    member = experiment(overrides)
    target = member.artefacts["quantization"]
    if arguments.target == "statistics":
        target = target.inputs["allocation"].inputs["statistics"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    if arguments.threads:
        command += ["--set-threads", *(f"{stage}={arguments.threads}" for stage in ("statistics", "quantization"))]
    command += ["--config", f"experiments={json.dumps([' '.join(overrides)])}", "--", f"{folder / 'results'}/{target.folder}"]

    trace, started = folder / "memory.csv", time.time()
    run = subprocess.Popen(command, cwd=folder)
    with trace.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["seconds", "stage", "resident", "own", "mapped"])
        if not trace.stat().st_size:
            writer.writeheader()
        while run.poll() is None:
            for pid, stage in stages_running(folder / "results").items():
                if found := memory_of(pid):
                    writer.writerow({"seconds": round(time.time() - started, 1), "stage": stage, **found})
            file.flush()
            time.sleep(0.5)
    if run.returncode:
        sys.exit(run.returncode)
    layer = 4 * (E * 3 * H * I + 2 * H * H + 2 * H * H * KV_HEADS // HEADS + E * H + 2 * H)
    activations = (6 if arguments.target == "quantization" else 3) * sequences * seq_len * H * 4
    out = folder / "results" / target.folder
    peak = json.loads((out / "provenance.json").read_text())["peak_memory_bytes"]
    bound = 1.5 * layer + activations
    summary = {
        "checkpoint_bytes": sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors")),
        "layer_float32_bytes": layer,
        "activations_bytes": activations,
        "peak_memory_bytes": peak,
        "bound_bytes": bound,
        "peak_over_layer": round((peak - activations) / layer, 3),
    }
    if (out / "timing.json").is_file():
        summary["timing"] = json.loads((out / "timing.json").read_text())
    (folder / "memory.json").write_text(json.dumps(summary, indent=1) + "\n")
    with trace.open(newline="") as file:
        draw(list(csv.DictReader(file)), bound, folder / "memory.png")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
