"""PESF against a loop over tokens, its promises as properties, and its effect inside a model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.evaluation.usage import watched
from moepress.inference.checkpoint import load
from moepress.pruning.pesf import pesf
from moepress.pruning.policy import attach, experts_of


def slow_pesf(index, weights, mask, num_experts, alpha, renormalize):
    index, weights = index.clone(), weights.clone()
    for b in range(len(index)):
        length, k = int(mask[b].sum()), index.shape[2]
        counts = [0] * num_experts
        for s in range(index.shape[1]):
            for e in index[b, s].tolist() if mask[b, s] else ():
                counts[e] += 1
        for s in range(index.shape[1]):
            row, before = weights[b, s].clone(), weights[b, s].sum()
            drop = [counts[e] < alpha * length * k / num_experts for e in index[b, s].tolist()]
            if all(drop):
                drop[int(row.argmax())] = False
            if not mask[b, s]:
                drop = [True] * k
            for j, dropped in enumerate(drop):
                if dropped:
                    index[b, s, j], weights[b, s, j] = num_experts, 0
            if renormalize and weights[b, s].sum() > 0:
                weights[b, s] *= before / weights[b, s].sum()
    return index, weights


def routing(B, S, K, E, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(B, S, E, generator=g) ** 4 * torch.rand(1, 1, E, generator=g)
    weights, index = scores.topk(K)
    lengths = torch.randint(1, S + 1, (B, 1), generator=g)
    return index, weights / weights.sum(-1, keepdim=True), torch.arange(S)[None] < lengths


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.floats(0, 2), st.booleans(), st.integers(0, 10**6))
def test_against_the_loop(B, S, K, alpha, renormalize, seed):
    index, weights, mask = routing(B, S, K, 6, seed)
    fast = pesf(index, weights, mask, 6, alpha, renormalize)
    slow = slow_pesf(index, weights, mask, 6, alpha, renormalize)
    assert torch.equal(fast[0], slow[0]) and torch.allclose(fast[1], slow[1], atol=1e-6)


def test_promises():
    index, weights, mask = routing(3, 40, 2, 8, 1)
    pruned, kept = pesf(index, weights, mask, 8, 0.9, True)
    assert (pruned[mask] < 8).any(-1).all(), "a token keeps an expert"
    assert (pruned[~mask] == 8).all() and (kept[~mask] == 0).all(), "padding has none"
    assert torch.allclose(kept.sum(-1)[mask], weights.sum(-1)[mask])
    assert (pruned[mask] == 8).any(), "something is pruned"
    unpruned = pesf(index, weights, mask, 8, 0.0, True)
    assert torch.equal(unpruned[0][mask], index[mask])
    one = pesf(index[:, :1], weights[:, :1], mask[:, :1], 8, 0.7, True)
    assert torch.equal(one[0], index[:, :1]), "decoding is left alone"


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_in_a_model_padding_and_neighbours_do_not_matter(model_folder, experts):
    model, _ = load(model_folder, "cpu")
    model.set_experts_implementation(experts)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 250, (2, 24), generator=g)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        policy = attach(model, {"method": "pesf", "alpha": 0.9, "renormalize": True})
        kept = []
        watch = experts_of(model)[0].register_forward_pre_hook(lambda _, args: kept.append(args[1]))
        alone = model(input_ids=ids[:1, :17]).logits
        mask = torch.ones_like(ids)
        mask[0, 17:] = 0
        padded = model(input_ids=ids, attention_mask=mask).logits[:1, :17]
        pruned = model(input_ids=ids).logits
        watch.remove()
        policy.remove()
        again = model(input_ids=ids).logits
    assert torch.allclose(alone, padded, atol=1e-4)
    assert (kept[0] == 4).any() and pruned.isfinite().all() and not torch.allclose(pruned, plain, atol=1e-3)
    assert torch.allclose(again, plain, atol=1e-5), "removed hooks leave no trace"


def test_decoding_is_left_alone(model_folder):
    """Whatever alpha: a prompt keeps one expert a token, a token that is decoded alone keeps all of its own."""
    model, _ = load(model_folder, "cpu", pruning={"method": "pesf", "alpha": 9.0, "renormalize": True})
    ids = torch.randint(1, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), watched(model) as (_, kept):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prefill, decode = kept[:2], kept[2:]
    assert all(((slots < 4).sum(1) == 1).all() for slots in prefill)
    assert len(decode) == 3 * 2 and all((slots < 4).all() for slots in decode)
