"""Attaching a pruning policy to a loaded model: hooks ahead of its experts that see the shape and padding of the batch."""

from dataclasses import dataclass

import torch
from torch import nn

from moepress.models.families import FAMILIES
from moepress.pruning.pesf import pesf


@dataclass
class Batch:
    """Of the forward in progress: True for tokens, False for padding, `[B, S]`."""

    mask_BS: torch.Tensor | None = None


def experts_of(model) -> list[nn.Module]:
    """The routed experts of every MoE layer, in order; each is called with `(hidden, top_k_index, top_k_weights)`."""
    family = FAMILIES[model.config.model_type]
    blocks = [layer.get_submodule(family.block) for layer in model.model.layers]
    return [block.experts for block in blocks if hasattr(block, "experts")]


def routers_of(model) -> list[nn.Module]:
    """The router of every MoE layer, in order; each gives `(logits, top_k_weights, top_k_index)`."""
    family = FAMILIES[model.config.model_type]
    blocks = [layer.get_submodule(family.block) for layer in model.model.layers]
    return [block.get_submodule(family.router) for block in blocks if hasattr(block, "experts")]


def attach(model, policy: dict) -> list:
    """Let the policy act on every later forward; returns the hooks, whose `remove()` ends that.

    policy: `{"method": "pesf", "alpha": ..., "renormalize": ...}` or `{"method": "none"}`.
    """
    if policy["method"] == "none":
        return []
    if policy["method"] != "pesf":
        raise ValueError(f"pruning.method={policy['method']!r}: one of none, pesf")
    batch = Batch()

    def see_batch(_, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        mask = kwargs.get("attention_mask")
        shape = ids.shape[:2]
        batch.mask_BS = torch.ones(shape, device=ids.device) if mask is None else mask[:, -shape[1] :].to(ids.device)

    def prune(experts, args):
        hidden_TH, index_TK, weights_TK = args
        shape = (*batch.mask_BS.shape, index_TK.shape[-1])
        if shape[1] == 1:
            return args
        index, weights = pesf(
            index_TK.view(shape),
            weights_TK.view(shape),
            batch.mask_BS,
            experts.num_experts,
            policy["alpha"],
            policy["renormalize"],
        )
        return hidden_TH, index.view_as(index_TK), weights.view_as(weights_TK)

    hooks = [model.register_forward_pre_hook(see_batch, with_kwargs=True)]
    for experts in experts_of(model):
        hooks.append(experts.register_forward_pre_hook(prune))
        # transformers' grouped experts leave the rows of "no expert" uninitialised unless told that there may be some
        experts._is_expert_parallel = True
    return hooks
