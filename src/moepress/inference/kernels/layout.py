"""What kernels and their callers agree on, in plain torch: numbers, the order of the inputs, the table of blocks, the joins.

The plain twins of the kernels themselves are `Experts.forward` and the plain part of `PackedLinear.forward`.

Legend: T tokens, K selected experts, S = T * K slots, E experts, X blocks of slots, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import torch

CHUNK = 8
"""Codes of a row that lie side by side and are loaded as one."""
PLANE = 16
"""Chunks of a plane, at most."""
ALIGN = 16
"""Bytes to which every matrix's codes are aligned, so that loads may be wide."""
SILU, CLAMPED = 1, 2
"""What joins gate and up: `silu(gate) * up`, or of clamped ones gpt_oss's `(up + 1) * gate * sigmoid(alpha * gate)`."""
DENSE, LEADER, SORTED = 0, 1, 2
"""How a program finds its slots. DENSE: one matrix for all. LEADER: the first slot of an expert does all slots of that expert,
the others end at once. SORTED: from a table of blocks of slots sorted by expert."""


def plane_of(group_size: int) -> int:
    """Chunks of a plane, a power of two: so many that a tile, CHUNK planes, lies in one group of weights."""
    return gcd(PLANE, group_size // CHUNK)


def planes(x_TC: torch.Tensor, plane: int) -> torch.Tensor:
    """`[T, C]`: the inputs in the order in which kernels unpack weights. Of each tile of CHUNK * plane columns first those of
    code 0 of all its chunks, then those of code 1, ..."""
    return x_TC.reshape(len(x_TC), -1, plane, CHUNK).mT.reshape(x_TC.shape)


def sorted_blocks(index_TK: torch.Tensor, num_experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(order [S], blocks [3, X])`: the slots by expert, and for each block of at most `block` slots of one expert that expert,
    its first place in order, and the expert's last. Blocks that are not needed have expert E; X is what could be needed, as
    how many are is known on the device alone. Nothing waits for it.
    """
    flat_S = index_TK.reshape(-1)
    experts_S, order = flat_S.sort(stable=True)
    device = flat_S.device
    ends_E = torch.searchsorted(experts_S, torch.arange(num_experts, device=device, dtype=flat_S.dtype), right=True)
    starts_E = torch.nn.functional.pad(ends_E[:-1], (1, 0))
    num_E = (ends_E - starts_E + block - 1) // block
    last_E = num_E.cumsum(0)  # of each expert, one past its last block
    most = min(len(flat_S), len(flat_S) // block + num_experts)
    number_X = torch.arange(most, device=device)
    expert_X = torch.searchsorted(last_E, number_X, right=True)
    e = expert_X.clamp(max=num_experts - 1)
    first_X = starts_E[e] + (number_X - last_E[e] + num_E[e]) * block
    return order.int(), torch.stack((expert_X, first_X, ends_E[e])).int()


@dataclass(frozen=True)
class Join:
    """A gated activation that the kernels know. interleaved: gate and up rows alternate, else all gate rows come first."""

    code: int
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, -1)
        if self.code == SILU:
            return torch.nn.functional.silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def join_of(activate: Callable[[torch.Tensor], torch.Tensor]) -> Join | None:
    """The join that does what an experts module's `_apply_gate` does, as shown on samples; None where none does."""
    module = getattr(activate, "__self__", None)
    known = [Join(SILU), Join(SILU, interleaved=True)]
    if hasattr(module, "alpha") and hasattr(module, "limit"):
        limits = {"alpha": float(module.alpha), "limit": float(module.limit)}
        known += [Join(CLAMPED, interleaved, **limits) for interleaved in (True, False)]
    sample = torch.linspace(-12, 12, 4 * 64).view(4, 64)[:, torch.arange(64) * 37 % 64]
    return next((join for join in known if torch.allclose(join(sample), activate(sample), atol=1e-5, rtol=1e-5)), None)
