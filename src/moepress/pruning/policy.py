"""Attaching a pruning policy to a loaded model: hooks on its routers that see the shape and padding of the batch."""

from dataclasses import dataclass

import torch
from torch import nn

from moepress.models.families import FAMILIES
from moepress.pruning.pesf import pesf


@dataclass
class Batch:
    """Of the forward in progress: True for tokens, False for padding, `[B, S]`."""

    mask_BS: torch.Tensor | None = None


def routers(model) -> list[nn.Module]:
    """The routers of every MoE layer, in order."""
    family = FAMILIES[model.config.model_type]
    return [layer.get_submodule(family.router) for layer in model.model.layers]


def attach(model, policy: dict) -> list:
    """Let the policy act on every later forward; returns the hooks, whose `remove()` ends that.

    policy: `{"method": "pesf", "alpha": ..., "renormalize": ...}` or `{"method": "none"}`.
    """
    if policy["method"] == "none":
        return []
    if policy["method"] != "pesf":
        raise ValueError(f"pruning.method={policy['method']!r}: one of none, pesf")
    family = FAMILIES[model.config.model_type]
    batch = Batch()

    def see_batch(_, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        mask = kwargs.get("attention_mask")
        shape = ids.shape[:2]
        batch.mask_BS = torch.ones(shape, device=ids.device) if mask is None else mask[:, -shape[1] :].to(ids.device)

    def prune(router, _, output):
        logits, weights_TK, index_TK = output
        shape = (*batch.mask_BS.shape, index_TK.shape[-1])
        if shape[1] == 1:
            return output
        index, weights = pesf(
            index_TK.view(shape),
            weights_TK.view(shape),
            batch.mask_BS,
            logits.shape[-1],
            policy["alpha"],
            policy["renormalize"],
        )
        return logits, weights.view_as(weights_TK), index.view_as(index_TK)

    hooks = [model.register_forward_pre_hook(see_batch, with_kwargs=True)]
    hooks += [router.register_forward_hook(prune) for router in routers(model)]
    for layer in model.model.layers:
        # transformers' grouped experts leave the rows of "no expert" uninitialised unless told that there may be some
        layer.get_submodule(family.experts)._is_expert_parallel = True
    return hooks
