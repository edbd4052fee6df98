"""What a quantized model's shifted selections cost alone, and its weights' error alone: perplexity of each on the test text."""

import gc

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from tqdm import tqdm

from moepress.artefacts import Task, write_json
from moepress.evaluation import perplexity as ppl
from moepress.evaluation.decomposition import Forced, forced, topk_overlap
from moepress.inference.checkpoint import fits, load_model, pick_device
from moepress.models.folders import locate
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import experts_of
from moepress.stages.evaluation import test_text

WORK = ("streams",)


def run(task: Task) -> None:
    config, device = task.config["evaluation"], pick_device(task.runtime["device"])
    checkpoint, original = locate(task.inputs["checkpoint"]), locate(task.inputs["model"])
    texts = {domain: blocks for domain, (blocks, _) in test_text(task.inputs["corpus"], checkpoint, config).items()}
    reference = load_file(task.inputs["reference"] / "selections.safetensors")
    known = pd.read_parquet(task.inputs["reference"] / "blocks.parquet").set_index("domain")["nll"]

    nll = {domain: {"16bit": known.loc[[domain]].to_numpy()} for domain in texts}
    model = load_model(checkpoint, device, verify=False)  # compared when the stage began
    selected = {}
    for domain, blocks in texts.items():
        both = _measure(model, blocks, config, f"both, {domain}")
        selected[domain], nll[domain]["both"] = both.selected_NSLK, both.nll_N
        with forced(model, reference[domain]):
            nll[domain]["weights_only"] = _measure(model, blocks, config, f"weights only, {domain}").nll_N
    del model
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps of a GPU's memory does not count as free
    if fits(original, device):
        model = load_model(original, device)
        for domain, blocks in texts.items():
            with forced(model, selected[domain]):
                nll[domain]["shift_only"] = _measure(model, blocks, config, f"shift only, {domain}").nll_N
    else:
        stream = ModelStream(original, device)
        mode = Forced(np.concatenate(list(selected.values())), stream.shape.num_experts)
        progress = tqdm(total=stream.shape.num_layers, desc=f"decomposition {task.name}", unit="layer")
        together = np.concatenate(list(texts.values()))
        found, _ = ppl.measure_streamed(stream, together, config["stride"], task.out / "streams", progress, mode)
        ends = np.cumsum([len(blocks) for blocks in texts.values()])[:-1]
        for domain, part in zip(texts, np.split(found, ends), strict=True):
            nll[domain]["shift_only"] = part

    summary = {}
    for domain, parts in nll.items():
        overlap_L, identical_L = topk_overlap(reference[domain], selected[domain])
        summary[domain] = {f"ppl_{name}": ppl.perplexity(values)[0] for name, values in parts.items()}
        summary[domain] |= {f"ppl_{name}_stderr": ppl.perplexity(values)[1] for name, values in parts.items()}
        summary[domain] |= {"topk_overlap": overlap_L.tolist(), "same_selection": identical_L.tolist()}
    write_json(task.out / "decomposition.json", {"domains": summary})
    rows = [pd.DataFrame({"domain": d, "block": range(len(texts[d])), **parts}) for d, parts in nll.items()]
    pd.concat(rows, ignore_index=True).to_parquet(task.out / "blocks.parquet")


@torch.inference_mode()
def _measure(model, blocks: np.ndarray, config: dict, what: str) -> ppl.Measured:
    with tqdm(total=len(blocks), desc=what, unit="block", mininterval=1) as progress:
        return ppl.measure(model, experts_of(model)[0].num_experts, blocks, config["batch_size"], config["stride"], progress)
