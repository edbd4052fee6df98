"""The packed checkpoint, layer by layer, with diagnostics of every layer."""

import time

from safetensors.torch import load_file
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.inference.checkpoint import pick_device
from moepress.models.families import locate
from moepress.models.streaming import ModelStream, drop_state, load_state, save_state
from moepress.quantization import writer
from moepress.quantization.qesc import Recipe, quantize_model
from moepress.report import card, made


def run(task: Task) -> None:
    recipe = Recipe(**task.config["quantization"])
    device = pick_device(task.runtime["device"])
    stream = ModelStream(locate(task.inputs["model"]), device)
    bits = read_json(task.inputs["allocation"] / "allocation.json")["bits"]
    tokens = None
    if "calibration" in task.inputs:
        tokens = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]

    num_layers = stream.shape.num_layers
    start, state = load_state(task.out)
    streams = (state["x"].to(device), state["x_hat"].to(device)) if "x" in state else None
    layers = read_json(task.out / "layers.json")[:start] if start else []
    remaining = tqdm(total=num_layers, initial=start, desc=f"quantization {task.name}", unit="layer")
    began = time.perf_counter()
    for result in quantize_model(stream, tokens, bits, recipe, start, streams):
        writer.write_shard(task.out, result.index, num_layers, result.tensors)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        layers.append({**result.diagnostics, "modules": result.modules, "seconds": round(seconds, 3)})
        write_json(task.out / "layers.json", layers)
        kept = {} if result.x is None else {"x": result.x, "x_hat": result.x_hat}
        save_state(task.out, result.index + 1, kept)
        remaining.update()

    modules = {name: width for layer in layers for name, width in layer["modules"].items()}
    writer.finish(task.out, stream, recipe.group_size, modules)
    diagnostics = [{name: value for name, value in layer.items() if name != "modules"} for layer in layers]
    starved = {layer["layer"]: layer["starved"] for layer in diagnostics if layer.get("starved")}
    if starved:
        print(f"experts with fewer calibration tokens than inputs, by layer (kept sound by the layer's curvature): {starved}")
    # Times differ from run to run, so they stay out of the files whose bytes must not.
    seconds = sum(layer.pop("seconds") for layer in diagnostics)
    write_json(task.out / "diagnostics.json", {"layers": diagnostics})
    size = writer.size_on_disk(task.out, writer.weights_of(stream.folder))
    write_json(task.out / "size.json", size)
    facts = made.facts(task, stream.shape)
    write_json(task.out / "card.json", facts)
    (task.out / "README.md").write_text(card.render(facts), encoding="utf-8")
    write_json(task.out / "timing.json", {"quantize_seconds": round(seconds, 3)})
    drop_state(task.out)  # before what belongs to it, so that a kill between the two only costs time
    (task.out / "layers.json").unlink()
