"""Time and error of our GPTQ against GPTQModel 7.6, in turn on one random Mixtral: `python benchmarks/gptq_peer.py`.

    python benchmarks/gptq_peer.py --shape coarse --rounds 3       # hidden 512, FFN 1024, 8 experts, top-2
    python benchmarks/gptq_peer.py --shape fine --rounds 3         # hidden 512, FFN 256, 64 experts, top-8

GPTQModel gets its own environment (it pins numpy), made once in --peer (default ~/.cache/moepress/gptqmodel; some minutes and
2 GB). Both sides quantize the attention and every expert of two layers to 4 bits in groups of 128 with 32 x 256 random
tokens, each in a process of its own, one after the other, as many rounds as asked; a round's time is from the loaded
tokens to the last quantized layer, in seconds of wall clock and of processor time; a first round of each (GPTQModel
compiles) is left out. Error: the mean over all experts' linears of `|X (W - Q)^T| / |X W^T|`, X the original model's inputs
of the linear, on the calibration tokens and on as many others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {
    "coarse": {"intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "fine": {"intermediate_size": 256, "num_local_experts": 64, "num_experts_per_tok": 8},
}
BITS, GROUP_SIZE, NUM_SEQUENCES, SEQ_LEN, VOCABULARY = 4, 128, 32, 256, 2048


def now() -> np.ndarray:
    """Seconds of wall clock and of this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def make_model(folder: Path, shape: str) -> None:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        dtype="float32",
        **SHAPES[shape],
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="1").save_pretrained(folder)
    tokens = torch.randint(VOCABULARY, (2, NUM_SEQUENCES, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    save_file({"calibration": tokens[0].clone(), "held_out": tokens[1].clone()}, folder / "tokens" / "tokens.safetensors")


def peer(folder: Path, out: Path) -> np.ndarray:
    """In GPTQModel's environment: quantize, keep the dequantized experts; seconds."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import load_file, save_file

    tokens = load_file(folder / "tokens" / "tokens.safetensors")["calibration"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model = GPTQModel.load(str(folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE))
    began = now()
    model.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
    seconds = now() - began
    model.save(str(out.with_suffix("")))  # what it quantized has left the memory
    model = GPTQModel.load(str(out.with_suffix("")), backend=BACKEND.TORCH, device="cpu")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w2": "w2", "w3": "w3"}
    found = {}
    for name, module in model.model.named_modules():
        parts = name.split(".")
        if "experts" in parts and hasattr(module, "dequantize_weight"):
            layer, expert = parts[parts.index("layers") + 1], parts[parts.index("experts") + 1]
            weight = module.dequantize_weight().float()
            found[f"{layer}.{expert}.{names[parts[-1]]}"] = weight.T.contiguous()  # theirs is [in, out]
    save_file(found, out)
    return seconds


def ours(folder: Path, out: Path) -> np.ndarray:
    from safetensors.torch import load_file, save_file

    import moepress
    from moepress.config import resolve
    from moepress.models.streaming import ModelStream
    from moepress.quantization import writer
    from moepress.quantization.experts import Recipe
    from moepress.quantization.layers import quantize_model

    keys = ["quantization=gptq", f"quantization.group_size={GROUP_SIZE}", f"quantization.attention_bits={BITS}"]
    recipe = Recipe(**{name: value for name, value in resolve(keys)["quantization"].items() if name != "name"})
    tokens = load_file(folder / "tokens" / "tokens.safetensors")["calibration"]
    stream = ModelStream(folder, "cpu")
    bits = [[BITS] * stream.shape.num_experts] * stream.shape.num_layers
    began = now()
    layers = list(quantize_model(stream, tokens, bits, recipe))
    seconds = now() - began
    packed = out.with_suffix("")
    packed.mkdir()
    for layer in layers:
        writer.write_shard(packed, layer.index, len(layers), layer.tensors)
    writer.finish(packed, stream, GROUP_SIZE, {name: width for layer in layers for name, width in layer.modules.items()})
    found = {}
    for index, layer in enumerate(moepress.load(packed)[0].model.layers):
        for e in range(layer.mlp.experts.num_experts):
            gate, up = layer.mlp.experts.gate_up_matrix(e, stream.dtype).chunk(2)
            for name, weight in (("w1", gate), ("w3", up), ("w2", layer.mlp.experts.down_matrix(e, stream.dtype))):
                found[f"{index}.{e}.{name}"] = weight.float().contiguous()
    save_file(found, out)
    return seconds


def errors(folder: Path, found: Path) -> dict[str, float]:
    """Mean relative output error of the experts' linears, by text."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights, tokens = load_file(found), load_file(folder / "tokens" / "tokens.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    result = {}
    for text, ids in tokens.items():
        seen = {}
        hooks = [
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, index=index, seen=seen: seen.update({index: args[:2]}))
            for index, layer in enumerate(model.model.layers)
        ]
        with torch.inference_mode():
            model(ids)
        for hook in hooks:
            hook.remove()
        ratios = []
        for index, layer in enumerate(model.model.layers):
            experts, (m, chosen) = layer.mlp.experts, seen[index]
            m = m.reshape(-1, m.shape[-1])
            for e in range(experts.num_experts):
                x = m[(chosen.reshape(len(m), -1) == e).any(-1)]
                gate, up = experts.gate_up_proj[e].detach().chunk(2)
                hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
                for name, w, inputs in (("w1", gate, x), ("w3", up, x), ("w2", experts.down_proj[e].detach(), hidden)):
                    change = inputs @ (w - weights[f"{index}.{e}.{name}"]).T
                    ratios.append((change.norm() / (inputs @ w.T).norm()).item())
        result[text] = statistics.mean(ratios)
    return result


def environment(folder: Path) -> Path:
    """GPTQModel's own environment, made where it is missing; its python."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing GPTQModel 7.6.0 in {folder} (some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for package in ("torch==2.13.0", "gptqmodel==7.6.0"):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        (folder / "installed").touch()
    return python


def one(python, side: str, folder: Path, out: Path, threads: int) -> list[float]:
    """One side's run in a process of its own."""
    own = {"OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": "2"}  # fewer it refuses
    command = [python, __file__, "--side", side, "--model", folder, "--out", out]
    done = subprocess.run(command, env=os.environ | own, cwd=folder.parent, capture_output=True, text=True)  # it leaves logs
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [float(part) for part in done.stdout.rsplit("seconds ", 1)[1].split()[:2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="coarse")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, default=Path.home() / ".cache" / "moepress" / "gptqmodel")
    for name in ("side", "model", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"peer": peer, "ours": ours}[arguments.side]
        print("seconds", *side(Path(arguments.model), Path(arguments.out)))
        return
    python = environment(arguments.peer.absolute())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        (folder / "tokens").mkdir(parents=True)
        make_model(folder, arguments.shape)
        times = {"peer": [], "ours": []}
        for turn in range(arguments.rounds + 1):
            for side, runs_in in (("peer", python), ("ours", sys.executable)):
                out = Path(temporary) / f"{side}-{turn}.safetensors"
                times[side].append(one(runs_in, side, folder, out, arguments.threads))
        found = {side: errors(folder, Path(temporary) / f"{side}-1.safetensors") for side in times}
    seconds = {side: np.array(rounds[1:]) for side, rounds in times.items()}  # [rounds, (wall, processor)]
    ratios = seconds["ours"] / seconds["peer"]
    result = {"shape": arguments.shape, "threads": arguments.threads, "error": found}
    for column, clock in enumerate(("wall", "processor")):
        result[clock] = {side: by[:, column].round(2).tolist() for side, by in seconds.items()}
        quantiles = np.quantile(ratios[:, column], (0, 0.5, 1)).round(3)
        result[clock]["ours / GPTQModel"] = dict(zip(("least", "median", "most"), quantiles.tolist(), strict=True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
