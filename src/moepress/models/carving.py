"""Cutting one dense MLP into a shared expert and routed experts, without training: functions of tensors.

A gated MLP is a sum over its neurons, `y = sum_j d_j a_j(x)` with `a_j(x) = act(g_j x) u_j x`. The neurons that matter most
to all tokens are shared; the others are put into groups of equal size, the experts, of which each token takes `top_k`. A
linear router predicts which groups matter, as MoEfication (Zhang et al. 2022) does, here by ridge regression; least squares
then let the neurons that a token takes make up for those that it leaves.

Legend: T tokens, H hidden size, I neurons (the dense intermediate size), R routed neurons, E experts, F features.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

ROUNDS = 8
"""Of k-means, at the most."""


@dataclass(frozen=True)
class Cut:
    """shared: indices of the neurons that every token takes. experts_ER: those of each routed expert. router_EH: its rows
    predict the log norm of what each expert adds, relative to the others'. down_HI: the refitted down projection, in the
    dense order of the neurons."""

    shared: torch.Tensor
    experts_ER: torch.Tensor
    router_EH: torch.Tensor
    down_HI: torch.Tensor


def row_weights(x_TH: torch.Tensor) -> torch.Tensor:
    """What a squared error in each token's residual stream counts, `[T]`, mean 1: the stream is normalised before it is read,
    so `1 / |x|^2`. Without it a few tokens with a norm a hundred times the usual decide every fit."""
    weights_T = 1 / x_TH.square().sum(1).clamp_min(torch.finfo(x_TH.dtype).tiny)
    return weights_T / weights_T.mean()


def solve_ridge(x_TF: torch.Tensor, y_TO: torch.Tensor, weights_T: torch.Tensor, ridge: float) -> torch.Tensor:
    """`B [F, O]` that minimises `sum_t w_t |y_t - x_t B|^2 + l |B|^2`, `l` being `ridge` times the mean of the normal
    matrix' diagonal."""
    weighted_TF = x_TF * weights_T[:, None]
    gram_FF = weighted_TF.T @ x_TF
    gram_FF.diagonal().add_(ridge * gram_FF.diagonal().mean().clamp_min(torch.finfo(x_TF.dtype).tiny))
    return torch.cholesky_solve(weighted_TF.T @ y_TO, torch.linalg.cholesky(gram_FF))


def importance(a_TI: torch.Tensor, down_HI: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """What leaving each neuron out would cost: the weighted mean of `|d_j a_j|^2`, `[I]`."""
    return (a_TI.square() * weights_T[:, None]).mean(0) * down_HI.square().sum(0)


def features(x_TH, a_TR, down_HR, weights_T, ridge: float, num_features: int) -> torch.Tensor:
    """Where the neurons lie, `[R, F]`: near each other if they matter to the same tokens, as far as a router can tell.

    A neuron's part `|d_j a_j|` is predicted linearly from x, and the leading eigenvectors of the predictions' correlations are
    the coordinates: what no router can know does not count.
    """
    magnitude_TR = a_TR.abs() * down_HR.norm(dim=0)
    predicted_TR = x_TH @ solve_ridge(x_TH, magnitude_TR, weights_T, ridge)
    predicted_TR = predicted_TR * weights_T.sqrt()[:, None]
    predicted_TR -= predicted_TR.mean(0)
    predicted_TR /= predicted_TR.norm(dim=0).clamp_min(torch.finfo(a_TR.dtype).tiny)
    values_R, vectors_RR = torch.linalg.eigh(predicted_TR.T @ predicted_TR)
    return vectors_RR[:, -num_features:] * values_R[-num_features:].clamp_min(0).sqrt()


def balanced_groups(features_RF: torch.Tensor, num_groups: int, seed: int) -> torch.Tensor:
    """k-means with groups of equal size, by exact assignment: indices `[E, R / E]` on the CPU, where all of it runs, ascending
    within each group."""
    features_RF = features_RF.cpu()
    num_points, size = len(features_RF), len(features_RF) // num_groups
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(num_points, (1,), generator=generator))]
    while len(chosen) < num_groups:  # k-means++: the next one far from those before it
        distance = torch.cdist(features_RF, features_RF[chosen]).min(1).values.square() + 1e-12
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    centres_EF, labels_R = features_RF[chosen], torch.empty(0, dtype=torch.long)
    for _ in range(ROUNDS):
        cost_RR = torch.cdist(features_RF, centres_EF).square().repeat_interleave(size, 1)
        assigned_R = torch.from_numpy(linear_sum_assignment(cost_RR.numpy())[1]) // size
        if torch.equal(assigned_R, labels_R):
            break
        labels_R = assigned_R
        centres_EF = torch.stack([features_RF[labels_R == e].mean(0) for e in range(num_groups)])
    return torch.stack([(labels_R == e).nonzero().flatten() for e in range(num_groups)])


def expert_norms(a_TI: torch.Tensor, down_HI: torch.Tensor, experts_ER: torch.Tensor) -> torch.Tensor:
    """The norm of what each expert adds to each token, `[T, E]`."""
    squares = []
    for neurons in experts_ER:
        a_TR, down_HR = a_TI[:, neurons], down_HI[:, neurons]
        squares.append(((a_TR @ (down_HR.T @ down_HR)) * a_TR).sum(1))  # |D a|^2 without D a, which is wider than a
    return torch.stack(squares, 1).clamp_min(0).sqrt()


def fit_router(x_TH, norms_TE, weights_T, ridge: float) -> torch.Tensor:
    """`[E, H]`: ridge regression of the log norms, centred over experts, for only their order within a token matters."""
    logs_TE = norms_TE.clamp_min(torch.finfo(norms_TE.dtype).tiny).log().clamp_min(-30)
    return solve_ridge(x_TH, logs_TE - logs_TE.mean(1, keepdim=True), weights_T, ridge).T.contiguous()


def taken(x_TH: torch.Tensor, shared: torch.Tensor, experts_ER: torch.Tensor, router_EH: torch.Tensor, top_k: int):
    """1 where a token takes a neuron, else 0, `[T, I]`."""
    num_tokens, num_experts = len(x_TH), len(experts_ER)
    chosen_TK = (x_TH @ router_EH.T).topk(top_k, dim=1).indices
    mask_TE = x_TH.new_zeros(num_tokens, num_experts).scatter_(1, chosen_TK, 1.0)
    mask_TI = x_TH.new_ones(num_tokens, len(shared) + experts_ER.numel())
    mask_TI[:, experts_ER.flatten()] = mask_TE.repeat_interleave(experts_ER.shape[1], 1)
    return mask_TI


def refit(z_TI, target_TH, down_HI, weights_T, ridge: float) -> torch.Tensor:
    """The down projection `[H, I]` nearest to the old one, in the sense of `solve_ridge`, that makes the target of what the
    tokens take."""
    return down_HI + solve_ridge(z_TI, target_TH - z_TI @ down_HI.T, weights_T, ridge).T


def cut(x_TH, a_TI, down_HI, target_TH, weights_T, settings: dict, seed: int) -> Cut:
    """Cut one MLP.

    x: the MLP's input. a: its neurons' activations. target: what the MLP is to make of x. settings: `shared_size, num_experts,
    top_k, router_ridge, down_ridge`.
    """
    order = importance(a_TI, down_HI, weights_T).argsort(descending=True, stable=True)
    shared, routed = order[: settings["shared_size"]].sort().values, order[settings["shared_size"] :].sort().values
    num_experts, ridge = settings["num_experts"], settings["router_ridge"]
    places_RF = features(x_TH, a_TI[:, routed], down_HI[:, routed], weights_T, ridge, num_experts)
    experts_ER = routed[balanced_groups(places_RF, num_experts, seed)]
    router_EH = fit_router(x_TH, expert_norms(a_TI, down_HI, experts_ER), weights_T, ridge)
    z_TI = a_TI * taken(x_TH, shared, experts_ER, router_EH, settings["top_k"])
    return Cut(shared, experts_ER, router_EH, refit(z_TI, target_TH, down_HI, weights_T, settings["down_ridge"]))
