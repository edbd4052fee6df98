"""How far a compressed model's predictions are from the 16-bit model's on the test text, token by token."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from moepress.artefacts import Task, read_json, write_json
from moepress.evaluation.divergence import divergence, same_choice
from moepress.evaluation.perplexity import num_scored
from moepress.inference.checkpoint import load_model, pick_device
from moepress.models.folders import locate
from moepress.models.streaming import ModelStream
from moepress.models.streams import run_layers
from moepress.pruning.policy import attach
from moepress.stages.evaluation import test_text

WORK = ("streams",)


@torch.inference_mode()
def run(task: Task) -> None:
    config, device = task.config["evaluation"], pick_device(task.runtime["device"])
    checkpoint, original = locate(task.inputs["checkpoint"]), locate(task.inputs["model"])
    texts = {domain: blocks for domain, (blocks, _) in test_text(task.inputs["corpus"], checkpoint, config).items()}
    ids_NS = torch.from_numpy(np.concatenate([*texts.values()]))
    domains = np.repeat([*texts], [len(blocks) for blocks in texts.values()])

    stream = ModelStream(original, device)
    with tqdm(total=stream.shape.num_layers, desc=f"16-bit model, for {task.name}", unit="layer") as progress:
        x_NSH = run_layers(stream, ids_NS, task.out / "streams", progress)

    model = load_model(checkpoint, device, verify=False)  # its hashes were compared when the stage began
    if "pruning" in task.inputs:
        attach(model, read_json(task.inputs["pruning"] / "policy.json"))
    scored = num_scored(ids_NS.shape[1], config["stride"])
    found: list[tuple[float, ...]] = []
    with tqdm(total=len(ids_NS), desc=f"divergence {task.name}", unit="block", mininterval=1) as progress:
        for chosen in torch.arange(len(ids_NS)).split(config["batch_size"]):
            logits = stream.logits(x_NSH[chosen])[:, -scored - 1 : -1]
            other = model(input_ids=ids_NS[chosen].to(model.device), use_cache=False).logits[:, -scored - 1 : -1]
            of_blocks = (measure(logits, other).float().mean(1).tolist() for measure in (divergence, same_choice))
            found += zip(*of_blocks, strict=True)
            progress.update(len(chosen))

    blocks = pd.DataFrame(found, columns=["divergence", "same_choice"])
    blocks.insert(0, "domain", domains)
    blocks.to_parquet(task.out / "blocks.parquet")
    write_json(task.out / "divergence.json", {"domains": blocks.groupby("domain", sort=False).mean().to_dict("index")})
