"""Router calibration (QESC, EAC-MoE, arXiv 2508.01625): a layer's router, fitted to hidden states that compression has changed.

z: the logits that the original router gives on the original model's hidden states. z_hat: what the router as it stands gives on
x_hat, the same tokens in the model compressed so far. A fit looks for the change D of its weight with which z_hat + D x_hat
comes close to z; a router's bias, or whatever else a family adds, is in z_hat and z already.

- `mse`: `sum_i (z_hat_i + D_i x_hat - z_i)^2` over all experts i;
- `topk_mse`: over the K' candidates, the experts that the original's choice puts first. That mask is the original's alone, so
  the problem separates by expert into least squares over the tokens that have it among their candidates: no learning rate;
- `topk_mse_gd`: the same by gradient descent, as the paper has it. It publishes no rate, steps or batch;
- `kl`: the divergence of the routing distributions, by gradient descent from the solution of `topk_mse`.

The result is never worse, by its own loss on the tokens that it is fitted to, than the router that was there.

Legend: T tokens, B tokens of one step, H hidden size, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-12
"""Adam's own; the second is far below the gradients of logits."""


def candidates(scores_TE: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` experts of each token with the highest scores: what the original's choice goes by."""
    mask_TE = torch.zeros(scores_TE.shape, dtype=torch.bool, device=scores_TE.device)
    return mask_TE.scatter_(1, scores_TE.topk(count, dim=-1).indices, True)


class Batch(NamedTuple):
    """Some of the tokens; float64."""

    x_hat_BH: torch.Tensor
    target_BE: torch.Tensor
    logits_BE: torch.Tensor
    mask_BE: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """What a fit sees: x_hat, perhaps on disk; target: z; logits: z_hat; mask: the candidates. at_once: so many tokens are in
    memory together. workspace: bytes that the normal equations of some experts may take."""

    x_hat_TH: torch.Tensor
    target_TE: torch.Tensor
    logits_TE: torch.Tensor
    mask_TE: torch.Tensor
    at_once: int
    workspace: int
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.x_hat_TH)

    def batch(self, rows: slice | torch.Tensor) -> Batch:
        x_hat, target, logits = (p[rows].to(self.device).double() for p in (self.x_hat_TH, self.target_TE, self.logits_TE))
        return Batch(x_hat, target, logits, self.mask_TE[rows].to(self.device))

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.at_once):
            yield self.batch(slice(start, start + self.at_once))


class SquaredError:
    """Mean over the candidates of `(z' - z)^2`: TopK-MSE as the paper prints it."""

    def value(self, logits_BE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`[B]`."""
        return ((logits_BE - batch.target_BE).square() * batch.mask_BE).sum(-1) / batch.mask_BE.sum(-1)

    def gradient(self, logits_BE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The gradient of each token's value with respect to its logits: `[B, E]`."""
        return 2 * (logits_BE - batch.target_BE) * batch.mask_BE / batch.mask_BE.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Divergence:
    """`KL(p || p')` of the distributions that the logits stand for. scores: softmax, one distribution over all experts;
    sigmoid, one for each expert, taken or not, and their sum. Convex in the weight either way."""

    scores: str

    def value(self, logits_BE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`[B]`, in nats."""
        if self.scores == "softmax":
            log_p, log_q = batch.target_BE.log_softmax(-1), logits_BE.log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        log_sigmoid = torch.nn.functional.logsigmoid
        taken, left = (log_sigmoid(s * batch.target_BE) - log_sigmoid(s * logits_BE) for s in (1, -1))
        p_BE = batch.target_BE.sigmoid()
        return (p_BE * taken + (1 - p_BE) * left).sum(-1)

    def gradient(self, logits_BE: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The gradient of each token's value with respect to its logits: `[B, E]`."""
        if self.scores == "softmax":
            return logits_BE.softmax(-1) - batch.target_BE.softmax(-1)
        return logits_BE.sigmoid() - batch.target_BE.sigmoid()


@dataclass(frozen=True)
class Fit:
    """How to fit; the fields are those of conf/quantization/qesc.yaml without `router_`, and the family's kind of scores."""

    loss: str
    ridge: float
    learning_rate: float = 0.0
    steps: int = 0
    batch: int = 0
    scores: str = "softmax"

    def run(self, tokens: Tokens, weight_EH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float, float]:
        """The fitted weight in the dtype that stores it, and the loss before and after; the weight as it was if that is
        less."""
        loss = Divergence(self.scores) if self.loss == "kl" else SquaredError()
        changes = []
        if self.loss != "topk_mse_gd":
            changes.append(least_squares(tokens, self.ridge))
        if self.loss in ("topk_mse_gd", "kl"):
            start_EH = changes[-1] if changes else torch.zeros_like(weight_EH, dtype=torch.float64)
            rate = self.learning_rate * weight_EH.double().square().mean().sqrt().item()
            changes.append(descend(tokens, start_EH, loss, rate, self.steps, self.batch))
        weights = [weight_EH.to(dtype), *((weight_EH.double() + change).to(dtype) for change in changes)]
        values = mean_values(tokens, [weight.double() - weight_EH.double() for weight in weights], loss)
        best = min(range(len(weights)), key=values.__getitem__)
        return weights[best], values[0], values[best]


def least_squares(tokens: Tokens, ridge: float) -> torch.Tensor:
    """The change `[E, H]` that minimises the squared error over the candidates, expert by expert.

    ridge: pull towards no change, as a share of the mean curvature; an expert that is nobody's candidate stays. As many
    experts go together as the workspace holds normal equations of; where every expert is a candidate of every token, they
    share one.
    """
    E, H = tokens.target_TE.shape[1], tokens.x_hat_TH.shape[1]
    is_shared = bool(tokens.mask_TE.all())
    step = E if is_shared else max(1, tokens.workspace // (3 * 8 * H**2))
    changes = []
    for start in range(0, E, step):
        experts = range(start, min(start + step, E))
        gram_EHH = torch.zeros(1 if is_shared else len(experts), H, H, dtype=torch.float64, device=tokens.device)
        cross_EH = torch.zeros(len(experts), H, dtype=torch.float64, device=tokens.device)
        for batch in tokens.batches():
            residual_BE = batch.target_BE - batch.logits_BE
            if is_shared:
                gram_EHH[0].addmm_(batch.x_hat_BH.T, batch.x_hat_BH)
                cross_EH.addmm_(residual_BE.T, batch.x_hat_BH)
                continue
            for i, e in enumerate(experts):
                rows = batch.mask_BE[:, e]
                x_hat = batch.x_hat_BH[rows]
                gram_EHH[i].addmm_(x_hat.T, x_hat)
                cross_EH[i].addmv_(x_hat.T, residual_BE[rows, e])
        diagonal_EH = gram_EHH.diagonal(dim1=-2, dim2=-1)
        diagonal_EH += ridge * diagonal_EH.mean(-1, keepdim=True).clamp(min=1e-12)
        factor_EHH = torch.linalg.cholesky(gram_EHH)
        if is_shared:
            changes.append(torch.cholesky_solve(cross_EH.T, factor_EHH[0]).T)
        else:
            changes.append(torch.cholesky_solve(cross_EH.unsqueeze(-1), factor_EHH).squeeze(-1))
    return torch.cat(changes)


def descend(tokens: Tokens, change_EH: torch.Tensor, loss, learning_rate: float, steps: int, batch_size: int) -> torch.Tensor:
    """The change after `steps` of Adam from a given one, the rate falling linearly to zero. Each pass over the tokens is in an
    order of its own, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    change_EH = change_EH.clone()
    mean_EH, square_EH = torch.zeros_like(change_EH), torch.zeros_like(change_EH)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if not len(order):
            order = torch.randperm(len(tokens), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        batch = tokens.batch(rows)
        logits_BE = batch.logits_BE + batch.x_hat_BH @ change_EH.T
        gradient_EH = loss.gradient(logits_BE, batch).T @ batch.x_hat_BH / len(rows)
        mean_EH.lerp_(gradient_EH, 1 - BETAS[0])
        square_EH.lerp_(gradient_EH.square(), 1 - BETAS[1])
        spread_EH = (square_EH / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        rate = learning_rate * (1 - (step - 1) / steps) / (1 - BETAS[0] ** step)
        change_EH.sub_(rate * mean_EH / spread_EH)
    return change_EH


def mean_values(tokens: Tokens, changes: list[torch.Tensor], loss) -> list[float]:
    """The loss of each change of the weight, mean over the tokens."""
    sums = [0.0] * len(changes)
    for batch in tokens.batches():
        for i, change_EH in enumerate(changes):
            sums[i] += loss.value(batch.logits_BE + batch.x_hat_BH @ change_EH.T, batch).sum().item()
    return [total / len(tokens) for total in sums]


def shift(original_TK: torch.Tensor, selected_TK: torch.Tensor) -> torch.Tensor:
    """Share of each token's selected slots that changed, `1 - |S & S16| / k`: `[T]`, for two selections of k experts."""
    kept = (original_TK.unsqueeze(-1) == selected_TK.unsqueeze(-2)).any(-1)
    return 1 - kept.float().mean(-1)
