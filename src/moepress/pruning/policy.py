"""Attaching a pruning policy to a loaded model: hooks ahead of its experts that see the shape and padding of the batch.

Legend: B sequences, S positions, T = B * S tokens, H hidden size, K selected experts, L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import nn

from moepress.models.families import ATTENTION, FAMILIES
from moepress.pruning import attention
from moepress.pruning.odp import importance, most_important, odp
from moepress.pruning.pesf import pesf
from moepress.pruning.static import Removal

NEEDED: dict[str, tuple[str, ...]] = {
    "none": (),
    "pesf": ("alpha", "renormalize"),
    "odp": ("renormalize",),
    "ees": ("renormalize",),
    "static": ("removed",),
}
"""Method -> keys without which a policy cannot act; the thresholds of odp and ees have two names, see `attach`."""


@dataclass
class Batch:
    """The forward in progress. mask: True for tokens, False for padding. past: positions that a cache holds before them.
    received: MoE layer -> the attention that each of its tokens receives, `[B, S]`, kept from its attention to its experts."""

    mask_BS: torch.Tensor = field(init=False)
    past: int = 0
    received: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Attached:
    """A policy at work in a model, until `remove()`. protected, tokens: counted over layers and forwards where ODP protects."""

    handles: list = field(default_factory=list)
    protected: torch.Tensor | int = 0
    tokens: torch.Tensor | int = 0

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    @property
    def protected_share(self) -> float:
        """Share of the tokens so far that kept all their experts for their importance; 0 where nothing is protected."""
        return float(self.protected / self.tokens) if self.tokens else 0.0


class MayBeLeftOut:
    """Until removed, tells transformers' grouped experts that some slots may have "no expert": they leave those rows
    uninitialised otherwise."""

    def __init__(self, experts):
        self.experts, self.before = experts, getattr(experts, "_is_expert_parallel", False)
        experts._is_expert_parallel = True

    def remove(self) -> None:
        self.experts._is_expert_parallel = self.before


def moe_layers(model) -> list:
    """The decoder layers with routed experts, in order."""
    block = FAMILIES[model.config.model_type].block
    return [layer for layer in model.model.layers if hasattr(layer.get_submodule(block), "experts")]


def experts_of(model) -> list:
    """The routed experts of every MoE layer, in order; each is called with `(hidden, top_k_index, top_k_weights)`."""
    path = FAMILIES[model.config.model_type].experts
    return [layer.get_submodule(path) for layer in moe_layers(model)]


def routers_of(model) -> list[nn.Module]:
    """The router of every MoE layer, in order; each gives `(logits, top_k_weights, top_k_index)`."""
    family = FAMILIES[model.config.model_type]
    return [layer.get_submodule(family.block).get_submodule(family.router) for layer in moe_layers(model)]


def attach(model, policy: dict) -> Attached:
    """Let the policy act on every later forward, until its `remove()`.

    policy: what the pruning stage writes to policy.json, or by hand
    `{"method": "none"}`,
    `{"method": "pesf", "alpha": ..., "renormalize": ...}`,
    `{"method": "odp", "threshold": ..., "protect": ..., "renormalize": ...}` (or `"thresholds"`, a list over the MoE layers),
    `{"method": "ees", "threshold": ..., "renormalize": ...}`,
    `{"method": "static", "removed": [[...], ...]}` (numbers of the experts of each MoE layer that are gone).

    Raises ValueError naming the key for other methods, keys that are missing, and lists that do not fit the model, which is
    then as it was.
    """
    method = policy.get("method")
    if str(method) not in NEEDED:
        raise ValueError(f"pruning.method={method!r}: one of {', '.join(NEEDED)}")
    for key in NEEDED[str(method)]:
        if key not in policy:
            given = f"pruning.{key} is missing, which pruning.method={method} needs"
            raise ValueError(f"{given}; take the policy.json of the pruning stage")
    attached = Attached()
    try:
        if method != "none":
            _attach(model, policy, attached)
    except BaseException:
        attached.remove()
        raise
    return attached


def _attach(model, policy: dict, attached: Attached) -> None:
    method, batch = policy["method"], Batch()
    layers, family = moe_layers(model), FAMILIES[model.config.model_type]
    rules = {"pesf": _pesf, "odp": _odp, "ees": _odp, "static": _static}[method](policy, len(layers), batch, attached)

    def see_batch(_, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        shape = ids.shape[:2]
        mask_BS = torch.ones(shape, device=ids.device) if mask is None else mask[:, -shape[1] :].to(ids.device)
        # a token that is decoded alone asks nothing of the past; a static cache keeps its length on the device
        batch.mask_BS, batch.past = mask_BS.bool(), int(past.get_seq_length()) if past is not None and shape[1] > 1 else 0
        batch.received.clear()

    def prune(rule: Callable, experts, args):
        hidden_TH, index_TK, weights_TK = args
        B, S = batch.mask_BS.shape
        index, weights = rule(experts, hidden_TH.reshape(B, S, -1), index_TK.view(B, S, -1), weights_TK.view(B, S, -1))
        return hidden_TH, index.view_as(index_TK), weights.view_as(weights_TK)

    attached.handles.append(model.register_forward_pre_hook(see_batch, with_kwargs=True))
    for layer, rule in zip(layers, rules, strict=True):
        experts = layer.get_submodule(family.experts)
        attached.handles.append(experts.register_forward_pre_hook(partial(prune, rule)))
        attached.handles.append(MayBeLeftOut(experts))
    if method == "static":
        for layer, removed in zip(layers, policy["removed"], strict=True):
            removed_E = _marked(tuple(removed), layer.get_submodule(family.experts).num_experts, model.device)
            attached.handles.append(
                Removal(layer.get_submodule(family.router_path), removed_E, partial(family.correction_of, layer))
            )
    if policy.get("protect"):
        layer_of = {layer.get_submodule(ATTENTION): index for index, layer in enumerate(layers) if hasattr(layer, ATTENTION)}
        attached.handles.append(_listen(model, layer_of, batch))


def _pesf(policy: dict, num_layers: int, batch: Batch, attached: Attached) -> list[Callable]:
    def rule(experts, hidden_BSH, index_BSK, weights_BSK):
        if index_BSK.shape[1] == 1:
            return index_BSK, weights_BSK
        return pesf(index_BSK, weights_BSK, batch.mask_BS, experts.num_experts, policy["alpha"], policy["renormalize"])

    return [rule] * num_layers


def _odp(policy: dict, num_layers: int, batch: Batch, attached: Attached) -> list[Callable]:
    """A token that is decoded alone has no later tokens that could attend to it: only the threshold acts."""
    thresholds = policy.get("thresholds")
    if thresholds is None:
        if policy.get("threshold") is None:
            raise ValueError(
                "pruning.thresholds: not given; take the policy.json of the pruning stage, or one threshold for all"
            )
        thresholds = [policy["threshold"]] * num_layers
    if len(thresholds) != num_layers:
        raise ValueError(f"pruning.thresholds: {len(thresholds)} of them, but the model has {num_layers} MoE layers")

    def rule(layer: int, experts, hidden_BSH, index_BSK, weights_BSK):
        mask_BS, protected_BS = batch.mask_BS, None
        if layer in batch.received:
            importance_BS = importance(hidden_BSH, batch.received.pop(layer), mask_BS)
            protected_BS = most_important(importance_BS, mask_BS, policy["protect"])
            attached.protected, attached.tokens = attached.protected + protected_BS.sum(), attached.tokens + mask_BS.sum()
        E, threshold = experts.num_experts, thresholds[layer]
        return odp(index_BSK, weights_BSK, mask_BS, E, threshold, protected_BS, policy["renormalize"])

    return [partial(rule, layer) for layer in range(num_layers)]


def _static(policy: dict, num_layers: int, batch: Batch, attached: Attached) -> list[Callable]:
    """Empties slots with removed experts. `Removal` keeps routers from selecting them, but one that first chooses among groups
    of experts may have none left in a group."""
    if len(policy["removed"]) != num_layers:
        raise ValueError(f"pruning.removed: {len(policy['removed'])} lists, but the model has {num_layers} MoE layers")

    def rule(removed: tuple[int, ...], experts, hidden_BSH, index_BSK, weights_BSK):
        gone_BSK = _marked(removed, experts.num_experts, index_BSK.device)[index_BSK]
        return index_BSK.masked_fill(gone_BSK, experts.num_experts), weights_BSK.masked_fill(gone_BSK, 0)

    return [partial(rule, tuple(removed)) for removed in policy["removed"]]


@cache
def _marked(removed: tuple[int, ...], num_experts: int, device) -> torch.Tensor:
    """True for the removed experts, `[E]`. Made once and kept: a GPU waits for a list that comes to it, which no CUDA graph can
    hold, and a graph reads the mask where it lies, also after the policy's end."""
    if not all(0 <= expert < num_experts for expert in removed):
        raise ValueError(f"pruning.removed: {[*removed]} are not all experts of a layer with {num_experts}")
    with torch.inference_mode(False):  # whoever comes first, it serves all
        index = torch.tensor(removed, device=device).long()
        return torch.zeros(num_experts, dtype=torch.bool, device=device).index_fill_(0, index, 1)


def _listen(model, layer_of: dict[nn.Module, int], batch: Batch):
    def heard(module, query, key, mask, scaling=None, s_aux=None, **_):
        if query.shape[2] > 1:
            sums_BS = attention.received(query, key, mask, batch.mask_BS.to(query.device), scaling, s_aux, batch.past)
            batch.received[layer_of[module]] = sums_BS

    return attention.Listener(model, list(layer_of), heard)
