"""The whole packed model tuned with its codes fixed: its scales, norms and routers, towards the 16-bit model's distribution.

    min  mean_t KL(p_t || p_hat_t)

over the calibration tokens, p from what left the 16-bit model's last layer. What is tuned layer by layer knows each layer's
output only; here it is weighed by what the model says. The packed model must fit in memory with what the tuning holds beside
it (`Prediction.tuning_bytes`): 22 bytes for each group of weights, the 16-bit model's head, the logits of one step, and of one
layer its activations and an expert unpacked, for each layer's forward is run again on the way back. The 16-bit model need not.

What rate a model bears falls with its depth, for each of Adam's first steps moves all scales of all layers by the whole rate.
Where a few steps double the divergence, or all of them raise it at all, the descent starts anew at a quarter of the rate.

Legend: N sequences, S positions, H hidden size.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from moepress.inference.checkpoint import load_model
from moepress.inference.saving import write_shard
from moepress.models.limits import TRIED
from moepress.models.streaming import ModelStream
from moepress.quantization.budget import is_distilled
from moepress.quantization.tuning import Tuned, descend


class Distilled(NamedTuple):
    """The tuned tensors of the packed folder by name (none where no rate lowered the divergence), each step's divergence in
    nats a token, and the first rate."""

    tensors: dict[str, torch.Tensor]
    losses: list[float]
    rate: float


@torch.no_grad()
def distill(
    folder: Path, stream: ModelStream, x_NSH: torch.Tensor, tokens_NS: torch.Tensor, steps: int, tokens: int, rate: float
) -> Distilled:
    """Tune the model in a packed folder, which stays as it is: see `replace`.

    x: what left the last layer of the 16-bit model, `stream`, for the tokens `[N, S]`. tokens: about so many a step. rate:
    Adam's first, relative to each scale; where it makes the model worse a quarter and a sixteenth of it are tried.
    """
    model = load_model(folder, stream.device, torch.float32, verify=False).requires_grad_(False)
    rest = {name: p for name, p in model.model.named_parameters() if is_distilled(stream.family, name)}
    dtypes = {name: dtype for shard in model.hf_quantizer.layout.values() for name, dtype in shard.items()}
    tuned = Tuned(model, {f"model.{name}": p for name, p in rest.items() if p.is_floating_point()})
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def loss(chosen):
        with torch.no_grad():
            log_p = stream.logits(x_NSH[chosen]).float().log_softmax(-1)
        log_p_hat = model(input_ids=tokens_NS[chosen].to(stream.device), use_cache=False).logits.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_p_hat)).sum(-1).mean()

    N, S = tokens_NS.shape
    batch = min(N, max(1, tokens // S))
    some = torch.arange(N)[:: -(-N // CHECKED)].split(batch)

    def divergence() -> float:
        return sum(loss(chosen).item() * len(chosen) for chosen in some) / sum(map(len, some))

    before = divergence()

    def descent(num: int, rate: float, most: float) -> Distilled | None:
        """None where the divergence is higher in the end than `most` times what it was."""
        tuned.restart()
        losses = descend(tuned, N, batch, num, rate, stream.shape.num_layers, loss, f"tuning the whole model at {rate:g}")
        tensors = {name: tensor.cpu() for name, tensor in tuned.finish(dtypes).items()}
        after = divergence()
        print(f"tuning the whole model, {num} steps at {rate:g}: {before:.4f} to {after:.4f} nats a token")
        return Distilled(tensors, losses, rate) if after < most * before else None

    for lower in (rate, rate / 4, rate / 16):
        is_bearable = steps <= TRIED or descent(TRIED, lower, most=2)
        if is_bearable and (found := descent(steps, lower, most=1)):
            return found
    print("tuning the whole model made it worse at every rate and is left out: take a smaller quantization.distill_rate")
    return Distilled({}, [], 0.0)


CHECKED = 16
"""Sequences that tell whether the tuning was for the better."""


def replace(folder: Path, tuned: dict[str, torch.Tensor]) -> None:
    """Put the tuned tensors into the shards of a packed folder, and their hashes into its index."""
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(path)
        if tensors.keys() & tuned.keys():
            write_shard(folder, path.name, tensors | {name: tuned[name] for name in tensors.keys() & tuned.keys()})


def keep(path: Path, found: Distilled) -> None:
    """Write the result whole or not at all: a run that was killed later goes on from it."""
    beside = path.with_suffix(".new")
    told = {name: torch.tensor(getattr(found, name), dtype=torch.float64) for name in ("losses", "rate")}
    save_file(found.tensors | told, beside)
    beside.replace(path)


def kept(path: Path) -> Distilled:
    tensors = load_file(path)
    return Distilled(losses=tensors.pop("losses").tolist(), rate=tensors.pop("rate").item(), tensors=tensors)
