"""The closed-form router fit against gradient descent, and the selection shift against sets."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.quantization.router import RouterFit, num_candidates, shift


def data(T=400, H=12, E=6, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=g)
    return torch.randn(E, H, generator=g), x, x @ (torch.eye(H) + noise * torch.randn(H, H, generator=g))


def topk_mse(w_new, w, x, x_hat, candidates):
    """The loss as the paper prints it, mask by the original logits."""
    logits = x @ w.T
    mask = torch.zeros_like(logits).scatter_(1, logits.topk(candidates).indices, 1)
    return (mask * (logits - x_hat @ w_new.T) ** 2).sum() / len(x) / candidates


def test_closed_form_is_the_minimum():
    w, x, x_hat = data()
    fit = RouterFit(w, 3)
    for part in range(0, 400, 100):
        fit.add(x[part : part + 100], x_hat[part : part + 100])
    solved = fit.solve(1e-9).float()
    descended = w.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([descended], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = topk_mse(descended, w, x, x_hat, 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert topk_mse(solved, w, x, x_hat, 3) <= topk_mse(descended, w, x, x_hat, 3) * 1.001
    assert topk_mse(solved, w, x, x_hat, 3) < 0.5 * topk_mse(w, w, x, x_hat, 3)


def test_same_stream_changes_nothing():
    w, x, _ = data()
    fit = RouterFit(w, 6)
    fit.add(x, x)
    assert torch.allclose(fit.solve(0.01).float(), w, atol=1e-5)


def test_an_expert_without_candidates_stays():
    w, x, x_hat = data()
    w[0] = 0
    x[:, 0], w[1:, 0] = 5.0, 3.0  # every other expert has a higher logit for every token
    fit = RouterFit(w, 2)
    fit.add(x, x_hat)
    solved = fit.solve(0.01).float()
    assert torch.equal(solved[0], w[0]) and not torch.allclose(solved[1:], w[1:])


def test_fit_reduces_the_shift():
    w, x, x_hat = data(T=2000)
    fit = RouterFit(w, 6)
    fit.add(x, x_hat)
    before = shift((x @ w.T).topk(2).indices, (x_hat @ w.T).topk(2).indices).mean()
    after = shift((x @ w.T).topk(2).indices, (x_hat @ fit.solve(1e-3).float().T).topk(2).indices).mean()
    assert after < 0.5 * before


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
