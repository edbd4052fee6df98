"""What a policy learns from calibration text, on the model that will be pruned (quantized where it is): ODP's and EES's
threshold of every layer, or which experts a static removal takes; and what it then saves there.

Legend: N sequences, S positions, T tokens, K selected experts, E experts.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from moepress.evaluation.usage import Usage, count, watched
from moepress.models.limits import TOKENS_AT_ONCE
from moepress.pruning.odp import ratios
from moepress.pruning.policy import attach, experts_of
from moepress.pruning.static import Scores, lowest


@torch.inference_mode()
def fit(model, token_ids_NS: torch.Tensor, pruning: dict, progress) -> dict:
    """The policy for `attach`: the group `pruning` with `thresholds` (odp, ees) or `removed` and `scores` (static), each a list
    over the MoE layers; and under `calibration` the number of tokens that it was fitted to (num_tokens), and of them the share
    of the selected slots that it computes (active_slots), of the tokens that it protects (protected_tokens), and of the
    experts that remain (remaining_experts).

    The model has no policy attached. progress: counts sequences. Raises ValueError where nothing can be left out: a model that
    selects one expert per token (odp, ees), a ratio that leaves fewer experts than a token selects (static).
    """
    policy = dict(pruning)
    if pruning["method"] == "static":
        policy |= _removal(model, token_ids_NS, pruning, progress)
    elif pruning["threshold"] is None:
        policy["thresholds"] = _thresholds(model, token_ids_NS, pruning["quantile"], progress)
    else:
        policy["thresholds"] = [pruning["threshold"]] * len(experts_of(model))
    num_experts, usage = experts_of(model)[0].num_experts, Usage()
    attached = attach(model, policy)
    with watched(model) as slots:

        def note(ids_BS):
            usage.add(*(count(selected, len(ids_BS), num_experts) for selected in slots))
            for selected in slots:
                selected.clear()

        _run(model, token_ids_NS, progress, note)
    attached.remove()
    removed = policy.get("removed", [])
    policy["calibration"] = {
        "num_tokens": token_ids_NS.numel(),
        "active_slots": usage.summary()["active_slots"],
        "protected_tokens": attached.protected_share,
        "remaining_experts": 1 - sum(map(len, removed)) / (num_experts * max(1, len(removed))),
    }
    return policy


def _run(model, token_ids_NS: torch.Tensor, progress, after: Callable = lambda _: None) -> None:
    for ids_BS in token_ids_NS.split(max(1, TOKENS_AT_ONCE // token_ids_NS.shape[1])):
        model(input_ids=ids_BS.to(model.device), use_cache=False, logits_to_keep=1)
        after(ids_BS)
        progress.update(len(ids_BS))


def _thresholds(model, token_ids_NS: torch.Tensor, quantile: float, progress) -> list[float]:
    """Each layer's threshold: this quantile of `odp.ratios` over all of its tokens."""
    found: list[list[np.ndarray]] = [[] for _ in experts_of(model)]
    hooks = [
        experts.register_forward_pre_hook(lambda _, args, own=own: own.append(ratios(args[2]).cpu().numpy().ravel()))
        for experts, own in zip(experts_of(model), found, strict=True)
    ]
    try:
        _run(model, token_ids_NS, progress)
    finally:
        for hook in hooks:
            hook.remove()
    if not found[0][0].size:
        raise ValueError("pruning: the model selects one expert per token, so none can be dropped; take pruning=none")
    return [float(np.quantile(np.concatenate(own), quantile)) for own in found]


def _removal(model, token_ids_NS: torch.Tensor, pruning: dict, progress) -> dict:
    """`removed` and `scores` of every layer."""
    every, top_k = experts_of(model), []
    scores = [Scores(experts.num_experts) for experts in every]

    def note(own: Scores, experts, args):
        hidden_TH, index_TK, weights_TK = args
        top_k.append(index_TK.shape[1])
        own.add(experts, hidden_TH, index_TK, weights_TK, norms=pruning["criterion"] == "reap")

    hooks = [e.register_forward_pre_hook(partial(note, own)) for e, own in zip(every, scores, strict=True)]
    try:
        _run(model, token_ids_NS, progress)
    finally:
        for hook in hooks:
            hook.remove()
    found = [own.of(pruning["criterion"]) for own in scores]
    removed = [lowest(scores_E, pruning["ratio"], max(top_k)) for scores_E in found]
    return {"removed": removed, "scores": [scores_E.tolist() for scores_E in found]}
