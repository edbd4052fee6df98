"""Selection frequency, routing weight and error per width of every expert, in one pass over the original model.

A layer's statistics need what enters it, and so the forward of all layers before it, but nothing of their statistics: blocks of
layers can be jobs of their own (`statistics.blocks`). Each repeats the forward up to its block, a few percent of the work.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from moepress.artefacts import Task, read_config, read_json, write_json
from moepress.inference.checkpoint import pick_device
from moepress.models import streams as hidden_states
from moepress.models.folders import locate
from moepress.models.specialisation import mutual_information
from moepress.models.streaming import ModelStream
from moepress.quantization.experts import Recipe
from moepress.quantization.sensitivity import Gradient
from moepress.statistics import layer_statistics

WORK = ("streams", "layers.json")


def run(task: Task) -> None:
    """All layers; or where blocks of them were jobs of their own, put together."""
    parts = [read_json(task.inputs[role] / "statistics.json") for role in sorted(task.inputs) if role.startswith("block-")]
    if parts:
        write_json(task.out / "statistics.json", {**parts[0], "layers": [layer for part in parts for layer in part["layers"]]})
    else:
        measure(task, 0, 1)


@torch.inference_mode()
def measure(task: Task, block: int, count: int) -> None:
    """The statistics of one of `count` blocks of layers, as even as they get."""
    widths = task.config["statistics"]["widths"]
    recipe = Recipe(method=task.config["statistics"]["quantizer"], **task.config["quantization"])
    stream = ModelStream(locate(task.inputs["model"]), pick_device(task.runtime["device"]))
    tokens = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]
    domain_of = pd.read_parquet(task.inputs["calibration"] / "origin.parquet")["domain"].tolist()
    coverage = read_config(task.inputs["calibration"])["calibration"]["coverage"]

    folder = task.out / "streams"
    streams = hidden_states.Streams(folder, ("x",), (*tokens.shape, stream.shape.hidden_size))
    start = streams.layer
    if start == 0:
        stream.embed(tokens, streams["x"])
    found = read_json(task.out / "layers.json") if start else []
    found = [layer for layer in found if layer["layer"] < start]
    first, end = (stream.shape.num_layers * i // count for i in (block, block + 1))
    remaining = tqdm(total=end, initial=start, desc=f"statistics {task.name}", unit="layer")
    for index, layer in islice(stream.layers(start), max(0, end - start)):
        if index < first:
            stream.attend(index, layer, streams["x"], streams.next("x"), streams.scratch("m"))
            stream.add_block(layer, streams.next("x"), streams.scratch("m"))
            write_json(task.out / "layers.json", found)
            streams.advance()
            remaining.update()
            continue
        gradient = read_gradient(task.inputs["gradients"], index, tokens.shape) if "gradients" in task.inputs else None
        statistics = layer_statistics(stream, index, layer, streams, recipe, widths, domain_of, coverage, gradient)
        if statistics:
            statistics["mutual_information"] = mutual_information(list(statistics["selections_by_domain"].values()))
            found.append(statistics)
        write_json(task.out / "layers.json", found)
        streams.advance()
        remaining.update()
    write_json(task.out / "statistics.json", {"widths": widths, "num_tokens": tokens.numel(), "layers": found})


def read_gradient(folder: Path, layer: int, shape: Sequence[int]) -> Gradient | None:
    """What the stage `gradients` left of a layer, None of a dense one. shape: of the calibration's tokens, `[N, S]`."""
    path = folder / f"layer-{layer:03d}.safetensors"
    if not path.is_file():
        return None
    g_NSH = load_file(path)["g"]
    row_NS = torch.full(shape, -1)
    row_NS[read_json(folder / "gradients.json")["sequences"]] = torch.arange(g_NSH[..., 0].numel()).view(g_NSH.shape[:2])
    return Gradient(row_NS.flatten(), g_NSH.flatten(0, 1))
