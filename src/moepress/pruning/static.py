"""Static expert removal, the baseline: the same experts are gone for every text, and tokens choose among those that remain.

Which ones go is told by calibration text: the least selected, or those with the smallest router-weighted activation norm (REAP,
arXiv 2510.13999): `S_e = mean over the tokens that select e of g_e(x) * ||f_e(x)||_2`.

REAP's way to remove an expert is to take its row out of the router. Here its logit is set to -inf as it leaves the router's
linear map, ahead of the softmax or sigmoid, of any correction and of the top-k, by the router's own code: so the kept routing
weights are normalised among the remaining experts as the family does it. Dropping the slots of removed experts instead would
have left tokens with fewer experts than the model was made for.

Legend: T tokens, H hidden size, K selected experts, E experts.
"""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from moepress.pruning import num_removed


class Scores:
    """Sums over calibration tokens of one layer."""

    def __init__(self, num_experts: int):
        self.tokens_E = torch.zeros(num_experts, dtype=torch.float64)
        self.norms_E = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, experts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, norms: bool) -> None:
        """norms: measure `g * ||f||` as well, which takes each expert's output by itself: they are called slot by slot."""
        self.tokens_E += torch.bincount(index_TK.flatten().cpu(), minlength=len(self.tokens_E))
        for slot in range(index_TK.shape[1]) if norms else ():
            one = slice(slot, slot + 1)
            norm_T = experts.forward(hidden_TH, index_TK[:, one], weights_TK[:, one]).float().norm(dim=-1)
            self.norms_E.index_add_(0, index_TK[:, slot].cpu(), norm_T.double().cpu())

    def of(self, criterion: str) -> torch.Tensor:
        """`[E]`: share of the tokens' slots (frequency), or REAP's score; an expert that no token selects has 0."""
        if criterion == "frequency":
            return self.tokens_E / self.tokens_E.sum()
        return self.norms_E / self.tokens_E.clamp(min=1)


def lowest(scores_E: torch.Tensor, ratio: float, top_k: int) -> list[int]:
    """The experts with the lowest scores, as many as `num_removed` has it, in order of their numbers."""
    removed = num_removed(ratio, len(scores_E), top_k)
    return sorted(scores_E.argsort(stable=True)[:removed].tolist())


class Without(TorchFunctionMode):
    """While a router runs: the removed experts' logits, and where there is one their correction of the selection, are -inf."""

    def __init__(self, removed_E: torch.Tensor, correction: torch.Tensor | None):
        super().__init__()
        self.removed_E, self.correction = removed_E, correction

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_logits = function is torch.nn.functional.linear
        is_corrected = self.correction is not None and isinstance(out, torch.Tensor) and out.is_floating_point()
        if is_logits or (is_corrected and any(arg is self.correction for arg in args)):
            return out.masked_fill(self.removed_E.to(out.device), -torch.inf)
        return out


class Removal:
    """Lets a router choose among the remaining experts only, until `remove()`. correction: gives the selection's, if any."""

    def __init__(self, router: torch.nn.Module, removed_E: torch.Tensor, correction: Callable[[], torch.Tensor | None]):
        self.router, forward = router, router.forward

        def among_the_rest(*args, **keywords):
            with Without(removed_E, correction()):
                return forward(*args, **keywords)

        router.forward = among_the_rest

    def remove(self) -> None:
        del self.router.forward
