"""Router fits: closed forms against a solver for each expert, gradients against autograd, descent against the closed form."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.models.limits import num_candidates
from moepress.models.streaming import ModelStream
from moepress.quantization import router
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from moepress.quantization.router import Divergence, Fit, SquaredError, Tokens, candidates, shift
from zoo import write_zoo_model

LOSSES = {"squared": SquaredError(), "softmax": Divergence("softmax"), "sigmoid": Divergence("sigmoid")}


def data(T=400, H=12, E=6, noise=0.3, seed=0, count=None, bias=0.0):
    """A router, and tokens whose hidden states were turned and stretched."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=g)
    w = torch.randn(E, H, generator=g)
    x_hat = x @ (torch.eye(H) + noise * torch.randn(H, H, generator=g)) + noise * torch.randn(T, H, generator=g)
    b = bias * torch.randn(E, generator=g)
    target, logits = x @ w.T + b, x_hat @ w.T + b
    return w, Tokens(x_hat, target, logits, candidates(target, count or E), 150, 2**30)


def topk_mse(w_new, w, tokens):
    """The loss as the paper prints it, mask by the original logits."""
    logits = tokens.logits_TE + tokens.x_hat_TH @ (w_new - w).T
    squares = tokens.mask_TE * (tokens.target_TE - logits) ** 2
    return (squares.sum(1) / tokens.mask_TE.sum(1)).mean()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1e-9, 0.01, 0.3]), st.integers(0, 100), st.sampled_from([1, 2**30]))
def test_closed_form_against_a_solver_for_each_expert(count, ridge, seed, workspace):
    """Ridge regression as least squares over rows that are added; experts together or one by one."""
    _, tokens = data(T=300, count=count, seed=seed, bias=1.0)
    found = router.least_squares(replace(tokens, workspace=workspace), ridge)
    for e in range(6):
        rows = tokens.mask_TE[:, e]
        x = tokens.x_hat_TH[rows].double()
        if not len(x):
            assert (found[e] == 0).all()
            continue
        pull = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(12, dtype=torch.float64)
        y = (tokens.target_TE - tokens.logits_TE)[rows, e].double()
        slow = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([y, y.new_zeros(12)])[:, None]).solution[:, 0]
        assert torch.allclose(found[e], slow, atol=1e-6)


def test_all_candidates_are_plain_mse():
    """The one Gram matrix that all experts share gives what each of them would find alone."""
    _, tokens = data()
    together = router.least_squares(tokens, 0.01)
    x, residual = tokens.x_hat_TH.double(), (tokens.target_TE - tokens.logits_TE).double()
    gram = x.T @ x
    alone = torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(12), x.T @ residual).T
    assert torch.allclose(together, alone, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_autograd(name):
    _, tokens = data(T=50, count=3)
    batch, loss = tokens.batch(slice(None)), LOSSES[name]
    logits = batch.logits_BE.clone().requires_grad_()
    loss.value(logits, batch).sum().backward()
    assert torch.allclose(loss.gradient(logits.detach(), batch), logits.grad, atol=1e-10)
    assert (loss.value(batch.logits_BE, batch) > 0).all()
    assert torch.allclose(loss.value(batch.target_BE, batch), torch.zeros(50, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_divergence_against_torch_distributions(scores):
    _, tokens = data(T=50)
    batch = tokens.batch(slice(None))
    if scores == "softmax":
        p, q = (torch.distributions.Categorical(logits=z) for z in (batch.target_BE, batch.logits_BE))
        expected = torch.distributions.kl_divergence(p, q)
    else:
        p, q = (torch.distributions.Bernoulli(logits=z) for z in (batch.target_BE, batch.logits_BE))
        expected = torch.distributions.kl_divergence(p, q).sum(-1)
    assert torch.allclose(Divergence(scores).value(batch.logits_BE, batch), expected)


@pytest.mark.parametrize("count", [3, 6])
def test_descent_reaches_the_closed_form(count):
    w, tokens = data(count=count)
    rms = w.square().mean().sqrt().item()
    least = router.mean_values(tokens, [router.least_squares(tokens, 1e-9)], SquaredError())[0]
    change = router.descend(tokens, torch.zeros_like(w, dtype=torch.float64), SquaredError(), 0.05 * rms, 1500, 400)
    value = router.mean_values(tokens, [change], SquaredError())[0]
    assert value == pytest.approx(least, rel=1e-3)


def test_descent_is_adam_at_a_falling_rate():
    """All tokens at once, against torch's own."""
    w, tokens = data(T=60, count=3)
    loss, batch, start = SquaredError(), tokens.batch(slice(None)), torch.zeros_like(w, dtype=torch.float64)
    slow = start.clone().requires_grad_()
    adam = torch.optim.Adam([slow], 0.1, router.BETAS, router.EPSILON)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / 7)
    for _ in range(7):
        adam.zero_grad()
        loss.value(batch.logits_BE + batch.x_hat_BH @ slow.T, batch).mean().backward()
        adam.step()
        rate.step()
    assert torch.allclose(router.descend(tokens, start, loss, 0.1, 7, 60), slow.detach(), atol=1e-9)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_descent_of_the_divergence_reaches_its_minimum(scores):
    """The minimum by torch's LBFGS; the divergence is convex, so there is one."""
    w, tokens = data()
    loss, batch = Divergence(scores), tokens.batch(slice(None))
    slow = torch.zeros_like(w, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([slow], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss.value(batch.logits_BE + batch.x_hat_BH @ slow.T, batch).mean()
        value.backward()
        return value

    optimizer.step(closure)
    start = router.least_squares(tokens, 1e-9)
    change = router.descend(tokens, start, loss, 0.05, 1500, 400)
    least, value, before = router.mean_values(tokens, [slow.detach(), change, start], loss)
    assert value == pytest.approx(least, rel=1e-3) and value < before


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["mse", "topk_mse", "topk_mse_gd", "kl"]),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 100),
)
def test_never_worse_than_the_router_that_was_there(loss, count, noise, rate, dtype, seed):
    """With any rate of the descent, and in the values that are stored."""
    w, tokens = data(T=100, noise=noise, seed=seed, count=6 if loss == "mse" else count)
    w = w.to(dtype).float()
    fitted, before, after = Fit(loss, 0.01, rate, 20, 32).run(tokens, w, dtype)
    measure = Divergence("softmax") if loss == "kl" else SquaredError()
    zero, change = (v.double() - w.double() for v in (w, fitted))
    assert fitted.dtype == dtype and after <= before
    assert [before, after] == pytest.approx(router.mean_values(tokens, [zero, change], measure))


def test_same_stream_changes_nothing():
    w, tokens = data(noise=0.0)
    for loss in ("topk_mse", "topk_mse_gd", "kl"):
        fitted, before, after = Fit(loss, 0.01, 0.01, 20, 100).run(tokens, w, torch.float32)
        assert torch.equal(fitted, w) and before == after == pytest.approx(0, abs=1e-12)


def test_an_expert_without_candidates_stays():
    _, tokens = data()
    target = tokens.target_TE.clone()
    target[:, 0] = -100
    tokens = replace(tokens, target_TE=target, mask_TE=candidates(target, 2))
    change = router.least_squares(tokens, 0.01)
    assert (change[0] == 0).all() and (change[1:].abs().sum(1) > 0).all()


def test_fit_reduces_the_shift():
    for loss in ("topk_mse", "topk_mse_gd", "kl"):
        w, tokens = data(T=2000)
        fitted, _, _ = Fit(loss, 1e-3, 0.05, 300, 500).run(tokens, w, torch.float32)
        original = tokens.target_TE.topk(2).indices
        before = shift(original, tokens.logits_TE.topk(2).indices).mean()
        after = shift(original, (tokens.x_hat_TH @ fitted.T).topk(2).indices).mean()
        assert after < 0.7 * before, loss


def test_number_of_candidates():
    assert [num_candidates(n, None) for n in (4, 8, 16, 60, 64)] == [4, 8, 8, 20, 21]
    assert num_candidates(8, 3) == 3 and num_candidates(8, 100) == 8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_shift_is_a_share_of_sets(k, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.stack([torch.randperm(9, generator=g)[:k] for _ in range(7)])
    b = torch.stack([torch.randperm(9, generator=g)[:k] for _ in range(7)])
    expected = [1 - len(set(p.tolist()) & set(q.tolist())) / k for p, q in zip(a, b, strict=True)]
    assert torch.allclose(shift(a, b), torch.tensor(expected))


COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 4, "fit_rounds": 1, "attention_bits": 4, "damping": 0.01}
COMMON |= {"block_size": 16, "router_ridge": 0.01, "router_learning_rate": 0.01, "router_steps": 30, "router_batch": 64}
TOKENS = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))


def quantized(folder, place=None, **changed):
    stream = ModelStream(folder)
    bits = [[2] * stream.shape.num_experts] * len(stream.shape.moe_layers)
    return quantize_model(stream, TOKENS, bits, Recipe(**{"method": "qesc", **COMMON, **changed}), place)


def same(one, other):
    return all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


@pytest.mark.parametrize("family", ["phimoe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe"])
def test_every_loss_on_routers_with_biases_and_corrections(family, tmp_path):
    """The losses fall, by what the family's own router says."""
    folder = write_zoo_model(tmp_path / "model", family)
    for loss in ("mse", "topk_mse", "topk_mse_gd", "kl"):
        for layer in quantized(folder, router_loss=loss):
            told = layer.diagnostics
            if "router_loss" in told:
                assert told["router_loss"] <= told["router_loss_before_fit"]
        assert "router_loss" in told and told["router_loss"] < told["router_loss_before_fit"]


@pytest.mark.parametrize("loss, count", [("topk_mse", 2), ("topk_mse", None), ("mse", 2)])
def test_candidates_are_what_the_original_choice_puts_first(loss, count, tmp_path, monkeypatch):
    """By the scores that the choice goes by, corrections included, of the original model's logits; all experts for `mse`."""
    folder, seen, run = write_zoo_model(tmp_path / "model", "deepseek_v3"), [], Fit.run
    monkeypatch.setattr(Fit, "run", lambda self, tokens, *rest: seen.append(tokens) or run(self, tokens, *rest))
    layers = list(quantized(folder, router_loss=loss, router_candidates=count))
    stream = ModelStream(folder)
    assert len(seen) == len(stream.shape.moe_layers) < len(layers)
    for index, tokens in zip(stream.shape.moe_layers, seen, strict=True):
        correction = stream.layer_tensors(index)["mlp.gate.e_score_correction_bias"]
        scores = tokens.target_TE.sigmoid() + correction.float()
        expected = torch.zeros_like(tokens.mask_TE)
        for t, best in enumerate(scores.argsort(-1, descending=True)[:, : count if loss == "topk_mse" and count else 8]):
            expected[t, best] = True
        assert torch.equal(tokens.mask_TE, expected)
        if not expected.all():
            assert not torch.equal(expected, candidates(tokens.target_TE, 2)), "the correction matters here"


def test_without_a_fit_it_is_gptq(model_folder):
    for own, gptq in zip(quantized(model_folder, router_loss="none"), quantized(model_folder, method="gptq"), strict=True):
        assert same(own, gptq) and "router_loss" not in own.diagnostics


def test_when_in_the_layer(model_folder):
    """In the first layer the router sees the same whenever it is fitted; the experts see another routing."""
    first = {when: next(quantized(model_folder, router_when=when)) for when in ("before", "after", "both")}
    none = next(quantized(model_folder, router_loss="none"))
    gate = next(name for name in none.tensors if name.endswith("gate.weight"))
    experts = [name for name in none.tensors if "experts" in name]
    assert torch.equal(first["before"].tensors[gate], first["after"].tensors[gate])
    assert not torch.equal(first["after"].tensors[gate], none.tensors[gate])
    assert all(torch.equal(first["after"].tensors[name], none.tensors[name]) for name in experts)
    assert not all(torch.equal(first["before"].tensors[name], none.tensors[name]) for name in experts)
    assert all(torch.equal(first["both"].tensors[name], first["before"].tensors[name]) for name in experts)
    assert first["both"].diagnostics["router_loss"] <= first["before"].diagnostics["router_loss"]


@pytest.mark.parametrize("loss", ["topk_mse_gd", "kl"])
def test_descent_goes_on_with_the_same_bytes(loss, model_folder, tmp_path):
    whole = list(quantized(model_folder, router_loss=loss))
    stopped = quantized(model_folder, tmp_path, router_loss=loss)
    next(stopped), next(stopped)  # the second layer is asked for, so the first is whole
    stopped.close()
    (rest,) = quantized(model_folder, tmp_path, router_loss=loss)
    assert rest.index == 1 and same(rest, whole[1])
