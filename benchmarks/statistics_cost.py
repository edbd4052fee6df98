"""What the statistics at four widths cost against one plain forward and one quantization of the same text.

    python benchmarks/statistics_cost.py --shape coarse --rounds 3 --threads 1

On the random Mixtrals of gptq_peer.py, 8192 tokens: the three in turn, as many rounds as asked after one that is left out, in
seconds of processor time; prints the median of each and of `statistics / (forward + quantization)`, least and most.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gptq_peer import GROUP_SIZE, SHAPES, make_model
from safetensors.torch import load_file
from tqdm import tqdm

from moepress.config import resolve
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams, run_layers
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from moepress.statistics import layer_statistics

WIDTHS = [1, 2, 3, 4]


def forward(model: Path, tokens: torch.Tensor, recipe: Recipe, folder: Path) -> None:
    run_layers(ModelStream(model, "cpu"), tokens, folder, tqdm(disable=True))


def quantization(model: Path, tokens: torch.Tensor, recipe: Recipe, folder: Path) -> None:
    stream = ModelStream(model, "cpu")
    bits = [[3] * stream.shape.num_experts] * stream.shape.num_layers
    for _ in quantize_model(stream, tokens, bits, recipe, folder):
        pass


def statistics(model: Path, tokens: torch.Tensor, recipe: Recipe, folder: Path) -> None:
    stream = ModelStream(model, "cpu")
    streams = Streams(folder, ("x",), (*tokens.shape, stream.shape.hidden_size))
    stream.embed(tokens, streams["x"])
    for index, layer in stream.layers(0):
        layer_statistics(stream, index, layer, streams, recipe, WIDTHS, ["text"] * len(tokens), "routed", None)
        streams.advance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="coarse")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = resolve(["quantization=gptq", f"quantization.group_size={GROUP_SIZE}"])["quantization"]
    recipe = Recipe(**{name: value for name, value in settings.items() if name != "name"})
    seconds = {work.__name__: [] for work in (forward, quantization, statistics)}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        (model / "tokens").mkdir(parents=True)
        make_model(model, arguments.shape)
        tokens = load_file(model / "tokens" / "tokens.safetensors")["calibration"]
        for turn in range(arguments.rounds + 1):
            for work in (forward, quantization, statistics):
                began = time.process_time()
                with torch.inference_mode(work is not quantization):  # which tunes where it is asked to
                    work(model, tokens, recipe, Path(temporary) / f"{work.__name__}-{turn}")
                seconds[work.__name__].append(time.process_time() - began)
    found = {name: np.array(rounds[1:]) for name, rounds in seconds.items()}
    ratios = found["statistics"] / (found["forward"] + found["quantization"])
    result = {"shape": arguments.shape, "threads": arguments.threads, "widths": WIDTHS}
    result |= {name: round(float(np.median(rounds)), 2) for name, rounds in found.items()}
    quantiles = np.quantile(ratios, (0, 0.5, 1)).round(2).tolist()
    print(json.dumps(result | {"ratio": dict(zip(("least", "median", "most"), quantiles, strict=True))}, indent=1))


if __name__ == "__main__":
    main()
