"""Router calibration: QESC's TopK-MSE (EAC-MoE, arXiv 2508.01625, expert-selection calibration), in closed form.

With the mask fixed by the original logits, `min sum over the K' candidates i of ((W x)_i - (W' x_hat)_i)^2` separates by
expert into a least-squares problem over the tokens that have it among their candidates: no learning rate, no epochs.

Legend: T tokens, H hidden size, E experts, K selected experts, C candidates.
"""

import torch


def num_candidates(num_experts: int, configured: int | None) -> int:
    """K': the configured number, else all of up to 8 experts and a third (at least 8) of more, which is near the paper's
    8 of 16, 20 of 64 and 20 of 60."""
    if configured is not None:
        return min(configured, num_experts)
    return num_experts if num_experts <= 8 else max(8, num_experts // 3)


class RouterFit:
    """Normal equations of the fit, accumulated over batches of tokens in float64."""

    def __init__(self, weight_EH: torch.Tensor, candidates: int):
        self.weight_EH = weight_EH.double()
        self.candidates = candidates
        E, H = weight_EH.shape
        self.gram_EHH = torch.zeros(E, H, H, dtype=torch.float64, device=weight_EH.device)
        self.cross_EH = torch.zeros(E, H, dtype=torch.float64, device=weight_EH.device)
        self.count_E = torch.zeros(E, dtype=torch.float64, device=weight_EH.device)

    def add(self, x_TH: torch.Tensor, x_hat_TH: torch.Tensor, scores_TE: torch.Tensor | None = None) -> None:
        """x: the router's input in the original model; x_hat: in the model compressed so far; same tokens. scores: what the
        original's choice goes by where that is not the logits `W x`."""
        target_TE = x_TH.double() @ self.weight_EH.T
        residual_TE = target_TE - x_hat_TH.double() @ self.weight_EH.T
        chosen_TC = (target_TE if scores_TE is None else scores_TE).topk(self.candidates, dim=-1).indices
        mask_TE = torch.zeros_like(target_TE, dtype=torch.bool).scatter_(1, chosen_TC, True)
        for expert, rows in enumerate(mask_TE.T):
            x_hat = x_hat_TH[rows].double()
            self.gram_EHH[expert].addmm_(x_hat.T, x_hat)
            self.cross_EH[expert].addmv_(x_hat.T, residual_TE[rows, expert])
            self.count_E[expert] += x_hat.shape[0]

    def solve(self, ridge: float) -> torch.Tensor:
        """W' `[E, H]`. ridge: pull towards W, as a share of the mean curvature; an expert that is nobody's candidate stays."""
        diagonal = self.gram_EHH.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        damped = self.gram_EHH.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge * diagonal[:, None])
        step = torch.linalg.solve(damped, self.cross_EH.unsqueeze(-1)).squeeze(-1)
        return self.weight_EH + step


def shift(original_TK: torch.Tensor, selected_TK: torch.Tensor) -> torch.Tensor:
    """Share of each token's selected slots that changed, `1 - |S & S16| / k`: `[T]`, for two selections of k experts."""
    kept = (original_TK.unsqueeze(-1) == selected_TK.unsqueeze(-2)).any(-1)
    return 1 - kept.float().mean(-1)
