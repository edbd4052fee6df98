"""How much attention each token receives, while fast attention serves the model.

transformers calls an attention function with the query, key and value that a layer has made (normed, rotated, latent ones
expanded), the same way in every family. Here a function of the same signature takes its place: it calls the one that was there
and besides sums the attention matrix's columns, from the same query and key, a block of rows at a time. The matrix itself,
S x S for every head, is never stored.

Legend: B sequences, S new positions, P positions with a key (past ones included), N query heads, M key heads, R = N / M, D head
size, Q rows of a block.
"""

import sys
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SCORES_AT_ONCE = 2**24
"""Attention scores in memory at once, over all heads and sequences (float32: 64 MiB)."""

PREFIX = "listened_"
"""Before the name of the attention function that is called underneath."""

_listeners: WeakKeyDictionary = WeakKeyDictionary()
"""Attention module -> what is to be called with its query, key, mask and keywords."""


def received(
    query_BNSD: torch.Tensor,
    key_BMPD: torch.Tensor,
    mask_B1SP: torch.Tensor | None,
    rows_BS: torch.Tensor,
    scaling: float | None = None,
    sinks_N: torch.Tensor | None = None,
    past: int = 0,
) -> torch.Tensor:
    """`sum_i A_ij`, mean over heads: the attention that the rows pay to each of the S new positions, float32 `[B, S]`.

    mask: True where attention may go, or added to the scores; None for a causal one. rows: True for the positions that pay:
    tokens, not padding. sinks: scores that take attention and have no position. past: positions before the first new one.
    """
    (B, N, S, D), (M, P) = query_BNSD.shape, key_BMPD.shape[1:3]
    if mask_B1SP is None and P > S:  # a cache with room that is still empty
        key_BMPD, P = key_BMPD[:, :, :S], S
    query_BMRSD = query_BNSD.view(B, M, N // M, S, D) * (D**-0.5 if scaling is None else scaling)
    sums_BP = torch.zeros(B, P, device=query_BNSD.device)
    step = max(1, SCORES_AT_ONCE // (B * N * P))
    for start in range(0, S, step):
        rows = slice(start, min(start + step, S))
        seen = rows.stop if mask_B1SP is None else P  # positions that some of these rows may attend to
        scores_BMRQP = torch.einsum("bmrqd,bmpd->bmrqp", query_BMRSD[:, :, :, rows].float(), key_BMPD[:, :, :seen].float())
        if mask_B1SP is None:
            position_Q1 = torch.arange(rows.start, rows.stop, device=sums_BP.device)[:, None]
            scores_BMRQP.masked_fill_(torch.arange(seen, device=sums_BP.device) > position_Q1, -torch.inf)
        elif mask_B1SP.dtype == torch.bool:
            scores_BMRQP.masked_fill_(~mask_B1SP[:, :, None, rows, :P], -torch.inf)
        else:
            scores_BMRQP += mask_B1SP[:, :, None, rows, :P]
        total_BMRQ1 = scores_BMRQP.logsumexp(-1, keepdim=True)
        if sinks_N is not None:
            total_BMRQ1 = torch.logaddexp(total_BMRQ1, sinks_N.float().view(1, M, N // M, 1, 1))
        attention_BMRQP = (scores_BMRQP - total_BMRQ1).exp_()
        attention_BMRQP.masked_fill_(~rows_BS[:, None, None, rows, None], 0)  # of padding it may be NaN: nothing to attend to
        sums_BP[:, :seen] += attention_BMRQP.sum((1, 2, 3)) / N
    first = min(past, P - S)
    return sums_BP[:, first : first + S]


class Listener:
    """Calls `heard(module, query, key, mask, **keywords)` for each of a model's attention modules, until `remove()`."""

    def __init__(self, model, modules: list[torch.nn.Module], heard: Callable):
        self.model, self.modules = model, modules
        self.before = model.config._attn_implementation
        base = self.before.removeprefix(PREFIX)
        if base not in ("sdpa", "eager"):
            raise ValueError(
                f"pruning.protect: attn_implementation={self.before!r} cannot be listened to; load the model with sdpa, "
                "or set pruning.protect=0"
            )
        AttentionInterface.register(PREFIX + base, _listened(base))
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
        for module in modules:
            _listeners[module] = heard
        model.set_attn_implementation(PREFIX + base)

    def remove(self) -> None:
        for module in self.modules:
            _listeners.pop(module, None)
        self.model.set_attn_implementation(self.before)


def _listened(base: str) -> Callable:
    def attend(module, query, key, value, attention_mask, **keywords):
        if heard := _listeners.get(module):
            heard(module, query, key, attention_mask, **keywords)
        own = sys.modules[type(module).__module__]
        call = own.eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
        return call(module, query, key, value, attention_mask, **keywords)

    return attend
