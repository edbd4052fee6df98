"""ODP and EES against loops over tokens; attention column sums against whole attention matrices of every family; both inside
models, with padding, in other company, and from a cache."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.evaluation.usage import watched
from moepress.inference.checkpoint import load, load_model
from moepress.pruning import attention
from moepress.pruning.fitting import fit
from moepress.pruning.odp import importance, most_important, odp, ratios
from moepress.pruning.policy import attach, experts_of, moe_layers
from test_pesf import routing
from zoo import ZOO, write_zoo_model

ODP = {"method": "odp", "threshold": 0.6, "protect": 0.2, "renormalize": True}


class Progress:
    def update(self, _):
        pass


def slow_odp(index, weights, mask, num_experts, threshold, protected, renormalize):
    index, weights = index.clone(), weights.clone()
    for b in range(len(index)):
        for s in range(index.shape[1]):
            row, kept = weights[b, s].tolist(), []
            for j, weight in enumerate(row):
                is_best = j == row.index(max(row))
                is_above = np.float32(weight) / np.float32(max(row)) >= threshold
                if mask[b, s] and (is_best or is_above or protected[b, s]):
                    kept.append(j)
                else:
                    index[b, s, j], weights[b, s, j] = num_experts, 0
            if renormalize and kept:
                weights[b, s] *= sum(row) / sum(row[j] for j in kept)
    return index, weights


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.floats(0, 1), st.booleans(), st.integers(0, 10**6))
def test_against_the_loop(B, S, K, threshold, renormalize, seed):
    index, weights, mask = routing(B, S, K, 6, seed)
    order = torch.rand(index.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)  # routers need not sort
    index, weights = index.gather(-1, order), weights.gather(-1, order)
    protected = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.3
    fast = odp(index, weights, mask, 6, threshold, protected, renormalize)
    slow = slow_odp(index, weights, mask, 6, threshold, protected, renormalize)
    assert torch.equal(fast[0], slow[0]) and torch.allclose(fast[1], slow[1], atol=1e-5)
    kept = fast[0] < 6
    best = weights.argmax(-1, keepdim=True)
    assert kept.gather(-1, best)[mask].all(), "no token loses its best expert"
    assert (kept[mask & protected] == 1).all() and not kept[~mask].any()
    dropped, stayed = weights.masked_fill(kept, 0).amax(-1), weights.masked_fill(~kept, torch.inf).amin(-1)
    assert (dropped <= stayed)[mask].all(), "none is dropped before a weaker one"


def test_a_median_drops_half_of_what_can_be_dropped():
    for K in (2, 4):
        index, weights, _ = routing(4, 100, K, 8, K)
        threshold = float(np.quantile(ratios(weights.view(-1, K)).numpy(), 0.5))
        kept = odp(index, weights, torch.ones(4, 100), 8, threshold, None, True)[0] < 8
        assert kept.float().mean() == pytest.approx(1 - (K - 1) / (2 * K), abs=0.005)
    assert torch.equal(odp(index, weights, torch.ones(4, 100), 8, 0.0, None, True)[0], index), "nothing below 0"


def test_a_token_without_any_weight_keeps_one_expert():
    """As sigmoid scores that underflow leave it."""
    index, mask = torch.tensor([[[2, 0, 1]]]), torch.ones(1, 1)
    assert odp(index, torch.zeros(1, 1, 3), mask, 4, 0.5, None, True)[0].tolist() == [[[2, 4, 4]]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.floats(0, 1), st.booleans(), st.integers(0, 10**6))
def test_importance_against_the_equation(B, S, share, left, seed):
    g = torch.Generator().manual_seed(seed)
    A, t = torch.rand(B, S, S, generator=g).tril(), torch.randn(B, S, 5, generator=g)
    lengths = torch.randint(1, S + 1, (B, 1), generator=g)
    mask = (torch.arange(S) >= S - lengths) if left else (torch.arange(S) < lengths)
    received = (A * mask[:, :, None]).sum(1)
    fast = importance(t, received, mask)
    chosen = most_important(fast, mask, share)
    for b in range(B):
        places = [s for s in range(S) if mask[b, s]]
        L, slow = len(places), []
        for j, s in enumerate(places):
            slow.append(sum(float(A[b, i, s]) for i in places[j:]) / (L - j) * sum(abs(x) for x in t[b, s].tolist()))
        assert fast[b, places].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-6)
        best = sorted(range(L), key=lambda j: (-float(fast[b, places[j]]), j))[: int(share * L + 0.5)]
        assert [j for j in range(L) if chosen[b, places[j]]] == sorted(best)
        assert not chosen[b, ~mask[b]].any()


def column_sums(model, ids, mask, **keywords):
    """What the policy's listener computes of every MoE layer, by the real hooks, and what it was given."""
    found = []
    spy = attention.received

    def noted(*arguments):
        found.append(spy(*arguments))
        return found[-1]

    attention.received = noted
    policy = attach(model, ODP | {"threshold": 0.0})  # nothing is dropped, so later layers see what the model sees
    try:
        out = model(input_ids=ids, attention_mask=mask, **keywords)
    finally:
        policy.remove()
        attention.received = spy
    return found, out


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("side", ["right", "left"])
def test_column_sums_against_the_attention_matrix(family, side, tmp_path, monkeypatch):
    """Of each family, by the fast function it runs with and in blocks of a few rows; the matrix by transformers' eager one."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 4 * 3 * 21 * 5)
    model = load_model(write_zoo_model(tmp_path / family, family))
    ids = torch.randint(1, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[21], [9], [14]])
    mask = (torch.arange(21) < lengths if side == "right" else torch.arange(21) >= 21 - lengths).long()
    before = model.config._attn_implementation
    with torch.inference_mode():
        plain = model(input_ids=ids, attention_mask=mask).logits
        found, listened = column_sums(model, ids, mask)
        assert model.config._attn_implementation == before
        model.set_attn_implementation("eager")
        matrices = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    same = torch.allclose(listened.logits[mask.bool()], plain[mask.bool()], atol=1e-4)  # padding is left out, so sums differ
    assert same, "listening changes nothing"
    attending = [layer for layer in model.model.layers if hasattr(layer, "self_attn")]  # linear attention has no matrix
    moe = [attending.index(layer) for layer in moe_layers(model) if layer in attending]
    assert len(found) == len(moe) > 0
    for sums_BS, place in zip(found, moe, strict=True):
        expected_BS = (matrices[place].float() * mask[:, None, :, None]).mean(1).sum(1)
        assert torch.allclose(sums_BS[mask.bool()], expected_BS[mask.bool()], atol=2e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_column_sums_without_padding_and_from_a_cache(family, tmp_path):
    model = load_model(write_zoo_model(tmp_path / family, family))
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, _ = column_sums(model, ids, None)
        cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
        rest, _ = column_sums(model, ids[:, 12:], torch.ones_like(ids), past_key_values=cache)
        model.set_attn_implementation("eager")
        matrices = model(input_ids=ids, output_attentions=True).attentions
    layers = [list(model.model.layers).index(layer) for layer in moe_layers(model)]
    for all_BS, new_BS, layer in zip(whole, rest, layers, strict=True):
        columns_BS = matrices[layer].float().mean(1).sum(1)
        assert torch.allclose(all_BS, columns_BS, atol=2e-5)
        assert torch.allclose(new_BS, columns_BS[:, 12:], atol=2e-5), "later tokens pay the whole of it"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_in_a_model_padding_and_neighbours_do_not_matter(family, tmp_path):
    model = load_model(write_zoo_model(tmp_path / family, family))
    ids = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        policy = attach(model, ODP)
        with watched(model) as (_, kept):
            alone = model(input_ids=ids[:1, :17]).logits
            assert policy.protected_share == pytest.approx(3 / 17)
            kept_alone = [slots.clone() for slots in kept]
            kept.clear()
            padded = model(input_ids=ids, attention_mask=mask).logits[:1, :17]
            K = kept[0].shape[1]
            for one, both in zip(kept_alone, kept, strict=True):
                assert torch.equal(one, both.view(2, 24, K)[0, :17]), "the same slots"
        pruned = model(input_ids=ids).logits
        policy.remove()
        again = model(input_ids=ids).logits
    assert torch.allclose(alone, padded, atol=1e-4)
    assert pruned.isfinite().all() and not torch.allclose(pruned, plain, atol=1e-3)
    assert torch.allclose(again, plain, atol=1e-5), "a removed policy leaves no trace"
    assert not any(layer.self_attn in attention._listeners for layer in model.model.layers)


def test_protection_acts_in_prefill_and_thresholds_alone_in_decoding(model_folder):
    model, _ = load(model_folder, "cpu", pruning=ODP | {"threshold": 1.0, "protect": 1.0})
    ids = torch.randint(1, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), watched(model) as (_, kept):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prefill, decode = kept[:2], kept[2:]
    assert all((slots < 4).all() for slots in prefill), "all are protected"
    assert decode and all(((slots < 4).sum(1) == 1).all() for slots in decode), "only the best is above 1"


@pytest.mark.usefixtures("in_parts")
def test_thresholds_are_the_quantiles_of_the_calibration_text(model_folder):
    model, _ = load(model_folder, "cpu")
    tokens = torch.randint(1, 250, (5, 32), generator=torch.Generator().manual_seed(1))
    seen = {}
    hooks = [
        experts.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[2]}))
        for layer, experts in enumerate(experts_of(model))
    ]
    with torch.inference_mode():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    group = {"method": "odp", "quantile": 0.5, "threshold": None, "protect": 0.1, "renormalize": True}
    policy = fit(model, tokens, group, Progress())
    slow = [np.median([min(row) / max(row) for row in seen[layer].tolist()]) for layer in sorted(seen)]
    assert policy["thresholds"] == pytest.approx(slow, rel=1e-5)
    assert policy["calibration"]["protected_tokens"] == pytest.approx(3 / 32)
    assert 0.75 < policy["calibration"]["active_slots"] < 0.85, "3 / 4, and half of a tenth of the tokens besides"
    ees = fit(model, tokens, {"method": "ees", "quantile": 0.5, "threshold": None, "renormalize": True}, Progress())
    assert ees["thresholds"] == policy["thresholds"]
    # the first layer drops exactly half of its second experts; later ones see what that did to their inputs
    assert ees["calibration"]["active_slots"] == pytest.approx(0.75, abs=0.05)
    fixed = fit(model, tokens, group | {"threshold": 0.4}, Progress())
    assert fixed["thresholds"] == [0.4, 0.4]
    with torch.inference_mode():
        attach(model, ees)
        a = model(input_ids=tokens).logits
    other, _ = load(model_folder, "cpu", pruning=policy | {"protect": 0.0})
    with torch.inference_mode():
        assert torch.equal(a, other(input_ids=tokens).logits), "EES is ODP that protects nothing"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"method": "ood"}, "one of none, pesf, odp, ees, static"),
        ({"method": "odp", "protect": 0.02, "renormalize": True}, "thresholds: not given"),
        ({"method": "ees", "thresholds": [0.1] * 5, "renormalize": True}, "5 of them, but the model has 2"),
        ({"method": "ees", "threshold": 0.1}, r"pruning\.renormalize is missing, which pruning\.method=ees needs"),
        (
            {"method": "pesf", "alpha": 0.3},
            r"pruning\.renormalize is missing, which pruning\.method=pesf needs; take the policy",
        ),
        ({"method": "static"}, r"pruning\.removed is missing, which pruning\.method=static needs"),
        ({"method": "static", "removed": [[0]]}, r"pruning\.removed: 1 lists, but the model has 2 MoE layers"),
        ({"method": "static", "removed": [[0], [4]]}, r"pruning\.removed: \[4\] are not all experts of a layer with 4"),
        ({"method": "static", "removed": [[0], [-1]]}, r"pruning\.removed: \[-1\] are not all experts"),
        ({"alpha": 0.3}, r"pruning\.method=None: one of none, pesf"),
    ],
)
def test_refusals(model_folder, policy, words):
    with pytest.raises(ValueError, match=words):
        load(model_folder, "cpu", pruning=policy)


def test_a_model_that_refuses_a_policy_is_as_it_was(model_folder):
    """Also where only its last layer tells that the policy does not fit, or its attention that it cannot be listened to."""
    model, _ = load(model_folder, "cpu")
    ids = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with pytest.raises(ValueError, match=r"pruning\.removed: \[9\]"):
            attach(model, {"method": "static", "removed": [[0, 1], [9]]})
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="cannot be listened to"):
            attach(model, ODP | {"threshold": 1.0})
        model.config._attn_implementation = "sdpa"
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert not any(getattr(experts, "_is_expert_parallel", False) for experts in experts_of(model))


def test_a_policys_file_that_is_not_there(model_folder, tmp_path):
    for path in (tmp_path, tmp_path / "policy.json"):
        with pytest.raises(ValueError, match=r"pruning='.*policy\.json': no such file; give the folder of a pruning stage"):
            load(model_folder, "cpu", pruning=path)
