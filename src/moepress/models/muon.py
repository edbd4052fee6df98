"""The optimizer of the small default model: Muon (Jordan et al. 2024) for matrices, Adam for the rest.

torch.optim.Muon takes 2-D parameters only; experts are 3-D, and a fused gate and up projection is two matrices.
"""

from concurrent.futures import ThreadPoolExecutor

import torch


class Optimizer:
    """Muon for the layers' matrices (experts: batches of them), Adam for the rest, one schedule for both.

    `state` holds fp32 tensors by parameter name: `NAME.m` and, for Adam, `NAME.v`.
    """

    def __init__(self, model, training: dict):
        self.parameters = dict(model.named_parameters())
        self.training = training
        self.state = {f"{name}.m": torch.zeros_like(p) for name, p in self.parameters.items()}
        self.state |= {f"{name}.v": torch.zeros_like(p) for name, p in self.parameters.items() if not self.is_muon(name)}

    def is_muon(self, name: str) -> bool:
        return name.endswith("_proj.weight") or "experts" in name

    def schedule(self, step: int) -> float:
        """Linear warm-up over `warmup` steps, then constant, then linear to zero over the last `decay` of all steps."""
        steps, warmup = self.training["steps"], self.training["warmup"]
        return min(1.0, (step + 1) / warmup, (steps - step) / (self.training["decay"] * steps))

    def step(self, step: int, pool: ThreadPoolExecutor) -> float:
        """Update all parameters from their gradients, clear these, return the schedule's factor."""
        scale = self.schedule(step)
        list(pool.map(lambda name: self.update(name, step, scale), self.parameters))
        return scale

    @torch.no_grad()
    def update(self, name: str, step: int, scale: float) -> None:
        """One step of the optimizer for one parameter, whose gradient is cleared. scale: the schedule's factor."""
        training, p, m = self.training, self.parameters[name], self.state[f"{name}.m"]
        if self.is_muon(name):
            m.lerp_(p.grad, 1 - training["momentum"])
            direction = p.grad.lerp(m, training["momentum"])
            rows = 2 if "gate_up" in name else 1
            update = torch.cat([orthogonal(part) for part in direction.chunk(rows, dim=-2)], dim=-2)
            update *= max(1.0, update.shape[-2] / rows / update.shape[-1]) ** 0.5
            rate = scale * training["muon_lr"]
            p.mul_(1 - rate * training["weight_decay"])
        else:
            beta1, beta2 = training["betas"]
            v = self.state[f"{name}.v"]
            m.lerp_(p.grad, 1 - beta1)
            v.lerp_(p.grad.square(), 1 - beta2)
            unbiased = v.div(1 - beta2 ** (step + 1)).sqrt_().add_(1e-10)
            update = m.div(1 - beta1 ** (step + 1)).div_(unbiased)
            rate = scale * training["adam_lr"]
        p.sub_(update, alpha=rate)
        p.grad = None


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices `[..., m, n]` by five Newton-Schulz iterations in bf16 (Muon)."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
