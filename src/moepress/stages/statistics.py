"""Selection frequency, routing weight and error per width of every expert, in one pass over the original model."""

import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.inference.checkpoint import pick_device
from moepress.models.families import locate
from moepress.models.specialisation import mutual_information
from moepress.models.streaming import ModelStream, drop_state, load_state, save_state
from moepress.quantization.qesc import Recipe
from moepress.statistics import layer_statistics


@torch.inference_mode()
def run(task: Task) -> None:
    widths = task.config["statistics"]["widths"]
    recipe = Recipe(method=task.config["statistics"]["quantizer"], **task.config["quantization"])
    device = pick_device(task.runtime["device"])
    stream = ModelStream(locate(task.inputs["model"]), device)
    tokens = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]
    domain_of = pd.read_parquet(task.inputs["calibration"] / "origin.parquet")["domain"]
    positions = stream.positions(tokens.shape[1])

    start, state = load_state(task.out)
    x = state["x"].to(device) if state else stream.embed(tokens)
    found = read_json(task.out / "layers.json") if start else []
    del found[start:]
    remaining = tqdm(total=stream.shape.num_layers, initial=start, desc=f"statistics {task.name}", unit="layer")
    for _, layer in stream.layers(start):
        statistics, x = layer_statistics(stream, layer, x, positions, recipe, widths, domain_of.tolist())
        statistics["mutual_information"] = mutual_information(list(statistics["selections_by_domain"].values()))
        found.append(statistics)
        write_json(task.out / "layers.json", found)
        save_state(task.out, len(found), {"x": x})
        remaining.update()
    write_json(task.out / "statistics.json", {"widths": widths, "num_tokens": tokens.numel(), "layers": found})
    drop_state(task.out)  # before what belongs to it, so that a kill between the two only costs time
    (task.out / "layers.json").unlink()
