"""Tuning a quantized layer with its codes fixed, against the 16-bit layer's output: its scales, its vectors and its router.

The quantized layer's own forward runs on the quantized stream's hidden states `x_hat`; its target is what the 16-bit layer
makes of the same, drawn by `tune_asymmetry` towards the output of the 16-bit layer on its own stream. Adam moves a multiplier
of every group's scale (and, with `tune_rest`, all of the layer's vectors, which are norms, biases and sinks, and its router),
some sequences a step, towards

    min  sum_t a_t |y_hat_t - y_t|^2,   a_t = min(1, median|y| / |y_t|)^2,

for without the weights a_t a few huge tokens would rule. A scale for every input of the down projection needs no parameter
of its own: it is a common factor of the up projection's row. Weights stay packed: an expert is unpacked when its turn comes,
and again on the way back, so that one expert at a time is whole in memory.

Legend: N sequences, S positions, H hidden size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from moepress.inference.packed import PackedExperts, PackedMatrices
from moepress.models.streaming import ModelStream


def token_weights(y_NSH: torch.Tensor) -> torch.Tensor:
    """`min(1, median|y| / |y_t|)^2`, `[N, S]`."""
    size_NS = torch.stack([y_SH.norm(dim=-1) for y_SH in y_NSH])
    return (size_NS.median() / size_NS.clamp(min=1e-30)).clamp(max=1).square()


class Tuned:
    """What is tuned in one layer: multipliers of the scales of its packed modules, and `rest`, parameters by their names."""

    def __init__(self, layer: nn.Module, rest: dict[str, nn.Parameter]):
        self.packed = {name: module for name, module in layer.named_modules() if isinstance(module, PackedMatrices)}
        self.scales = {name: module.scales.float() for name, module in self.packed.items()}
        self.rest, self.before = rest, {name: tensor.detach().clone() for name, tensor in rest.items()}
        self.restart()

    def restart(self) -> None:
        """Everything as it was before any tuning."""
        self.factors = {name: torch.ones_like(scales) for name, scales in self.scales.items()}
        for name, tensor in self.rest.items():
            tensor.requires_grad_(False).copy_(self.before[name])

    def groups(self, rate: float) -> list[dict]:
        """Adam's: the rate is relative to a scale, and to the mean size of each tensor of the rest."""
        groups = [{"params": [factor.requires_grad_() for factor in self.factors.values()], "lr": rate}]
        for tensor in self.rest.values():
            groups.append({"params": [tensor.requires_grad_()], "lr": rate * tensor.detach().square().mean().sqrt().item()})
        return groups

    def apply(self) -> None:
        """Put the scales as they are now into the layer, differentiable."""
        for name, module in self.packed.items():
            module.scales = self.scales[name] * self.factors[name]

    def finish(self, dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Round what was tuned to the checkpoint's dtypes, put it into the layer, and return it by name. dtypes: the rest's."""
        tensors = {}
        for name, module in self.packed.items():
            factor = self.factors[name].detach().clamp(min=0.1)  # a scale stays above 0
            tensors[f"{name}.scales"] = module.scales = (self.scales[name] * factor).half()
        for name, tensor in self.rest.items():
            tensors[name] = tensor.requires_grad_(False).to(dtypes[name])
            tensor.copy_(tensors[name])
        return tensors


def descend(
    tuned: Tuned, num: int, batch: int, steps: int, rate: float, seed: int, loss: Callable, told: str | None = None
) -> list[float]:
    """Adam over `num` sequences, `batch` a step, on `loss(chosen)`; leaves the result in `tuned`, returns each step's loss.

    rate: the first, see `Tuned.groups`; it falls to 0 as a cosine. told: what progress, where it is shown, is called. The order
    follows from the seed alone, so a run that was killed ends with the same bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(tuned.groups(rate), betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    left, losses = torch.empty(0, dtype=torch.long), []
    for step in tqdm(range(steps), desc=told, unit="step", disable=told is None):
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(num, generator=generator)])
        chosen, left = left[:batch], left[batch:]
        with torch.enable_grad():
            tuned.apply()
            found = loss(chosen)
            found.backward()
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(found.item())
    return losses


def tune(
    stream: ModelStream,
    index: int,
    layer: nn.Module,
    x_hat_NSH: torch.Tensor,
    target_NSH: torch.Tensor,
    tuned: Tuned,
    steps: int,
    tokens: int,
    rate: float,
) -> list[float]:
    """Tune a layer in `steps` steps of about `tokens` tokens, in place; returns each step's relative error."""
    N, S = x_hat_NSH.shape[:2]
    weights_NS = token_weights(target_NSH)

    def loss(chosen):
        y_hat = stream.call(index, layer, x_hat_NSH[chosen].to(stream.device))
        y, weight = target_NSH[chosen].to(stream.device), weights_NS[chosen].to(stream.device)
        return (weight * (y_hat - y).square().sum(-1)).sum() / (weight * y.square().sum(-1)).sum()

    experts = [module for module in layer.modules() if isinstance(module, PackedExperts)]
    for module in experts:  # what an expert's forward keeps for its backward would be all its weights
        again = partial(checkpoint, module.output, use_reentrant=False, preserve_rng_state=False)
        module.output = again  # type: ignore[method-assign]
    try:
        return descend(tuned, N, min(N, max(1, tokens // S)), steps, rate, index, loss)
    finally:
        for module in experts:
            del module.output
