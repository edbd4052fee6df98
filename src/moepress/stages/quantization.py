"""The packed checkpoint, layer by layer, with diagnostics of every layer."""

import time

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from moepress.artefacts import Task, peak_memory, read_config, read_json, write_json
from moepress.inference.checkpoint import pick_device
from moepress.models import limits, outline
from moepress.models import streams as hidden_states
from moepress.models.folders import locate, num_weights
from moepress.models.streaming import ModelStream
from moepress.quantization import distilling, writer
from moepress.quantization.budget import Prediction
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from moepress.report import card, made
from moepress.wording import readable

WORK = ("streams", "layers.json")


def run(task: Task) -> None:
    recipe = Recipe(**task.config["quantization"])
    stream = ModelStream(locate(task.inputs["model"]), pick_device(task.runtime["device"]))
    bits = read_json(task.inputs["allocation"] / "allocation.json")["bits"]
    tokens, coverage = None, "routed"
    if "calibration" in task.inputs:
        tokens = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]
        coverage = read_config(task.inputs["calibration"])["calibration"]["coverage"]
    check_memory(task, stream, bits, 0 if tokens is None else tokens.shape[1])

    num_layers, folder = stream.shape.num_layers, task.out / "streams"
    start = hidden_states.next_layer(folder)
    layers = read_json(task.out / "layers.json")[:start] if start else []
    remaining = tqdm(total=num_layers, initial=start, desc=f"quantization {task.name}", unit="layer")
    began = time.perf_counter()
    for result in quantize_model(stream, tokens, bits, recipe, folder, coverage):
        writer.write_shard(task.out, result.index, num_layers, result.tensors)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        layers.append({**result.diagnostics, "modules": result.modules, "seconds": round(seconds, 3)})
        layers[-1]["peak_memory_bytes"] = peak_memory()
        write_json(task.out / "layers.json", layers)
        del result  # with its tensors, before the next layer's are read
        remaining.update()

    modules = {name: width for layer in layers for name, width in layer["modules"].items()}
    writer.finish(task.out, stream, recipe.group_size, modules)
    divergence = distilled(task, stream, recipe, tokens, folder) if recipe.distill_steps and tokens is not None else {}
    diagnostics = [{name: value for name, value in layer.items() if name != "modules"} for layer in layers]
    starved = {layer["layer"]: layer["starved"] for layer in diagnostics if layer.get("starved")}
    if starved:
        print(f"experts with fewer calibration tokens than inputs, by layer (kept sound by the layer's curvature): {starved}")
    # Times differ from run to run, so they stay out of the files whose bytes must not.
    timing = {name: [layer.pop(name) for layer in diagnostics] for name in ("seconds", "peak_memory_bytes")}
    seconds = sum(timing["seconds"])
    write_json(task.out / "diagnostics.json", {"layers": diagnostics} | divergence)
    size = writer.size_on_disk(task.out, num_weights(stream.folder))
    write_json(task.out / "size.json", size)
    facts = made.facts(task, stream.shape)
    write_json(task.out / "card.json", facts)
    (task.out / "README.md").write_text(card.render(facts), encoding="utf-8")
    # again, with the folder's bytes: the card, which reads size.json, counts among them
    write_json(task.out / "size.json", size | {"folder_bytes": writer.folder_bytes(task.out)})
    seconds += time.perf_counter() - began
    write_json(task.out / "timing.json", {"quantize_seconds": round(seconds, 3), "layers": timing})


def check_memory(task: Task, stream: ModelStream, bits: list[list[int]], seq_len: int) -> None:
    """ValueError, before any work, for a packed model that is to be tuned as a whole and does not fit in memory with what the
    tuning holds beside it."""
    settings = task.config["quantization"]
    if not settings.get("distill_steps"):
        return
    prediction = Prediction(outline.read(stream.folder, "model.path"), settings)
    needed = prediction.loaded_bytes(bits, "cpu")  # float32 on a GPU too
    tuning = prediction.tuning_bytes(max(settings["tune_tokens"], seq_len))
    on_gpu = torch.device(stream.device).type == "cuda"
    has = torch.cuda.mem_get_info(stream.device)[0] if on_gpu else limits.free_memory()
    if needed + tuning > has:
        raise ValueError(
            f"quantization.distill_steps={settings['distill_steps']}: the packed model takes {readable(needed)} of memory and "
            f"its tuning {readable(tuning)}, there is {readable(has)}; set it to 0, or take experiment=fast, which never holds "
            "more than a layer"
        )


def distilled(task: Task, stream: ModelStream, recipe: Recipe, tokens, folder) -> dict:
    """Tune the whole packed model; its divergence in the first and the last tenth of the steps, and their rate. What is found
    is kept beside the hidden states until the folder is whole, so that a run that is killed while the shards are rewritten ends
    with the same bytes."""
    path = folder / "tuned.safetensors"
    if not path.is_file():
        if "distillation" in task.inputs:
            tokens = load_file(task.inputs["distillation"] / "tokens.safetensors")["token_ids"]
            again = ModelStream(stream.folder, stream.device)  # a stream gives each of its layers once
            with tqdm(total=stream.shape.num_layers, desc=f"text to tune {task.name} on", unit="layer") as progress:
                x = hidden_states.run_layers(again, tokens, folder / "distillation", progress)
        else:
            x = hidden_states.Streams(folder, ("x",), (*tokens.shape, stream.shape.hidden_size))["x"]
        settings = (recipe.distill_steps, recipe.tune_tokens, recipe.distill_rate)
        distilling.keep(path, distilling.distill(task.out, stream, x, tokens, *settings))
    tuned = distilling.kept(path)
    distilling.replace(task.out, tuned.tensors)
    if not tuned.tensors:
        return {"divergence": None, "distill_rate": None}
    tenth = -(-len(tuned.losses) // 10)
    ends = [sum(part) / tenth for part in (tuned.losses[:tenth], tuned.losses[-tenth:])]
    return {"divergence": ends, "distill_rate": tuned.rate}
