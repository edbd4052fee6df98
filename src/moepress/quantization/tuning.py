"""Tuning a quantized layer against the 16-bit layer's output: its scales, and, if asked for, its codes, norms and router.

The quantized layer's own forward runs on the quantized stream's hidden states `x_hat`; its target is what the 16-bit layer
makes of the same. Adam moves a multiplier of every group's scale (and the layer's norms and router), some sequences a step,
towards

    min  sum_t a_t |y_hat_t - y_t|^2,   a_t = min(1, median|y| / |y_t|)^2,

for without the weights a_t a few huge tokens would rule. A scale for every input of the down projection needs no parameter
of its own: it is a common factor of the up projection's row. Weights stay packed: an expert is unpacked when its turn comes,
and again on the way back, so that one expert at a time is whole in memory.

Codes move as AutoRound's do (Cheng et al., arXiv 2309.05516): each has a float beside it that begins where the 16-bit weight
lies within the code's cell, is rounded on the way forward, takes the gradient as if it were not, and goes a step against the
gradient's sign. That takes a float32 for every weight of the layer but, without Adam's moments and with each gradient used and
dropped as it comes, nothing more.

Legend: N sequences, S positions, H hidden size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moepress.inference.packed import PackedExperts, PackedMatrices
from moepress.models.streaming import ModelStream
from moepress.quantization.packing import pack, unpack
from moepress.quantization.size import ZERO_STEPS, zero_width

CELL = 0.49
"""How far a code's cell reaches to either side: short of a half, so that rounding gives the code."""


def token_weights(y_NSH: torch.Tensor) -> torch.Tensor:
    """`min(1, median|y| / |y_t|)^2`, `[N, S]`."""
    size_NS = torch.stack([y_SH.norm(dim=-1) for y_SH in y_NSH])
    return (size_NS.median() / size_NS.clamp(min=1e-30)).clamp(max=1).square()


class Latents:
    """The codes of a packed module as floats that sign descent moves; while it is attached the module computes with them.

    original: the 16-bit matrix of each of the module's, `e -> [rows, columns]`.
    """

    def __init__(self, module: PackedMatrices, original: Callable[[int], torch.Tensor]):
        self.module, self.rate = module, 0.0
        groups, self.latents, self.zeros = module.columns // module.group_size, [], []
        for e, bits in enumerate(module.bits):
            codes = unpack(module.codes[module.code_starts[e] : module.code_starts[e + 1]], module.rows * module.columns, bits)
            zeros = module.zeros[module.zero_starts[e] : module.zero_starts[e + 1]]
            self.zeros.append(unpack(zeros, module.rows * groups, zero_width(bits)).view(module.rows, groups))
            codes = codes.view(module.rows, module.columns).float()
            scale, shift = module.scales[e].float().unsqueeze(-1), self.zeros[e].float().unsqueeze(-1) / ZERO_STEPS
            latent = (original(e).float().unflatten(-1, (groups, -1)) / scale + shift).flatten(-2)
            latent = latent.clamp(codes - CELL, codes + CELL).requires_grad_()
            latent.register_post_accumulate_grad_hook(partial(self.step, 2**bits - 1))
            self.latents.append(latent)

    def step(self, top: int, latent: torch.Tensor) -> None:
        """Against the gradient's sign, no further than the outermost codes' cells; the gradient is dropped."""
        with torch.no_grad():
            latent.add_(latent.grad.sign_(), alpha=-self.rate).clamp_(-CELL, top + CELL)
        latent.grad = None

    def matrix(self, e: int, dtype: torch.dtype) -> torch.Tensor:
        """In the module's place: matrix e with rounded latents, their gradient as if they were not rounded."""
        latent, scales = self.latents[e], self.module.scales[e].float()
        rounded = latent + (latent.detach().round() - latent.detach())
        grouped = rounded.unflatten(-1, (scales.shape[-1], -1)) - self.zeros[e].float().unsqueeze(-1) / ZERO_STEPS
        return (grouped * scales.unsqueeze(-1)).flatten(-2).to(dtype)

    def finish(self) -> None:
        """Pack the codes as they are now."""
        self.module.codes = torch.cat(
            [pack(u.detach().round(), b) for u, b in zip(self.latents, self.module.bits, strict=True)]
        )


class Tuned:
    """What is tuned in one layer: multipliers of the scales of its packed modules, and `rest`, parameters by their names."""

    def __init__(self, layer: nn.Module, rest: dict[str, nn.Parameter]):
        self.packed = {name: module for name, module in layer.named_modules() if isinstance(module, PackedMatrices)}
        self.scales = {name: module.scales.float() for name, module in self.packed.items()}
        self.factors = {name: torch.ones_like(scales) for name, scales in self.scales.items()}
        self.rest = rest

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
        """What the checkpoint holds of it by name, and the layer from now on. dtypes: the rest's on disk."""
        tensors = {}
        for name, module in self.packed.items():
            factor = self.factors[name].detach().clamp(min=0.1)  # a scale stays above 0
            tensors[f"{name}.scales"] = module.scales = (self.scales[name] * factor).half()
            tensors[f"{name}.codes"] = module.codes
        for name, tensor in self.rest.items():
            tensors[name] = tensor.requires_grad_(False).to(dtypes[name])
            tensor.copy_(tensors[name])
        return tensors


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
    code_rate: float = 0.0,
    originals: dict[str, Callable] | None = None,
) -> list[float]:
    """Run `steps` steps of about `tokens` tokens and leave the result in `tuned`; returns each step's relative error.

    rate: of the scales, relative; code_rate: of the codes, in codes a step, 0 leaves them fixed. Both fall to 0 as a cosine.
    originals: by the packed modules' names, what `Latents` begins with.

    The sequences' order depends on the layer's index alone, so a run that was killed ends with the same bytes.
    """
    N, S = x_hat_NSH.shape[:2]
    batch = min(N, max(1, tokens // S))
    weights_NS = token_weights(target_NSH)
    generator = torch.Generator().manual_seed(index)
    optimizer = torch.optim.Adam(tuned.groups(rate), betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    left, errors = torch.empty(0, dtype=torch.long), []
    experts = [module for module in layer.modules() if isinstance(module, PackedExperts)]
    latents = [Latents(module, originals[name]) for name, module in tuned.packed.items()] if code_rate else []
    for latent in latents:
        latent.module.matrix = latent.matrix
    for module in experts:  # what an expert's forward keeps for its backward would be all its weights
        module.output = partial(checkpoint, module.output, use_reentrant=False)
    try:
        for step in range(steps):
            if len(left) < batch:
                left = torch.cat([left, torch.randperm(N, generator=generator)])
            chosen, left = left[:batch], left[batch:]
            falling = (1 + math.cos(math.pi * step / steps)) / 2
            for latent in latents:
                latent.rate = code_rate * falling
            with torch.enable_grad():
                tuned.apply()
                y_hat = stream.call(index, layer, x_hat_NSH[chosen].to(stream.device))
                y, weight = target_NSH[chosen].to(stream.device), weights_NS[chosen].to(stream.device)
                loss = (weight * (y_hat - y).square().sum(-1)).sum() / (weight * y.square().sum(-1)).sum()
                loss.backward()
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * falling
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            errors.append(loss.item())
    finally:
        for module in experts:
            del module.output
        for latent in latents:
            del latent.module.matrix
    for latent in latents:
        latent.finish()
    return errors
