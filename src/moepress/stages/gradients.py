"""The gradient of the loss at every MoE layer's output, for a few of the calibration's sequences."""

import json

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.data.sampling import spread
from moepress.gradients import LOSS, layer_gradients
from moepress.inference.checkpoint import pick_device
from moepress.models.folders import locate
from moepress.models.streaming import ModelStream

WORK = ("streams", "layers.json")


def run(task: Task) -> None:
    stream = ModelStream(locate(task.inputs["model"]), pick_device(task.runtime["device"]))
    tokens = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]
    chosen = spread(len(tokens), task.config["gradients"]["num_sequences"]).tolist()
    tokens, folder, notes = tokens[chosen], task.out / "streams", task.out / "layers.json"

    found = {layer["layer"]: layer for layer in (read_json(notes) if notes.is_file() else [])}
    with tqdm(desc=f"gradients {task.name}", unit="layer", initial=len(found)) as progress:
        for index, g_NSH in layer_gradients(stream, tokens, folder):
            if index in stream.shape.moe_layers:
                save_file({"g": g_NSH.bfloat16()}, task.out / f"layer-{index:03d}.safetensors")
            norm = g_NSH.square().sum(-1).mean().sqrt().item()
            found[index] = {"layer": index, "gradient": norm}
            write_json(notes, list(found.values()))
            progress.update()
    write_json(
        task.out / "gradients.json",
        {
            "sequences": chosen,
            "nll_per_token": sum(json.loads((folder / LOSS).read_text())) / (tokens.numel() - len(tokens)),
            "layers": sorted(found.values(), key=lambda layer: layer["layer"]),
        },
    )
