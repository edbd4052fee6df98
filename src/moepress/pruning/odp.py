"""ODP, online dynamic pruning (MC, arXiv 2410.06270): a token goes without the experts that weigh little beside its best one,
unless the token is important.

The paper has K = 2 and drops the second expert when w_1 / w_0 < mu, mu the layer's median ratio on calibration text. For any
K, here: each expert but the best is dropped when w / w_best < mu, with one mu for a layer, fitted to the ratios of all its
lower ranks together. So no expert is dropped before a weaker one, and the median drops half of what can be dropped,
(K - 1) / 2K of all slots. (One mu for each rank could drop the second expert and keep the third.)

EES, the ratio without protection (Lu et al., arXiv 2402.14800), is the same function with no token protected.

Legend: B sequences, S positions, T = B * S tokens, H hidden size, K selected experts, E experts.
"""

import torch


def ratios(weights_TK: torch.Tensor) -> torch.Tensor:
    """Each lower rank's routing weight over the best's, `[T, K - 1]`, descending."""
    ranked_TK = weights_TK.float().sort(-1, descending=True).values
    return ranked_TK[:, 1:] / ranked_TK[:, :1].clamp(min=1e-20)


def odp(
    index_BSK: torch.Tensor,
    weights_BSK: torch.Tensor,
    mask_BS: torch.Tensor,
    num_experts: int,
    threshold: float,
    protected_BS: torch.Tensor | None,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(index, weights)` without the experts whose ratio to their token's best is below the threshold.

    mask: True for tokens, False for padding, whose slots are emptied. protected: tokens that keep all their experts; None for
    no token. renormalize: the kept weights of a token sum to what they summed to. An empty slot has index E and weight 0.
    """
    valid_BS1, K = mask_BS.bool()[..., None], index_BSK.shape[-1]
    best_BS1 = weights_BSK.float().amax(-1, keepdim=True).clamp(min=1e-20)
    keep_BSK = weights_BSK.float() / best_BS1 >= threshold
    keep_BSK |= torch.nn.functional.one_hot(weights_BSK.argmax(-1), K).bool()
    if protected_BS is not None:
        keep_BSK |= protected_BS[..., None]
    keep_BSK &= valid_BS1
    kept = torch.where(keep_BSK, weights_BSK, torch.zeros_like(weights_BSK))
    if renormalize:
        kept = kept * (weights_BSK.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-20))
    return torch.where(keep_BSK, index_BSK, num_experts), kept


def importance(inputs_BSH: torch.Tensor, received_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """MC's token importance `I_j = ||t_j||_1 * sum_{i >= j} A_ij / (L - j)`, `[B, S]`; 0 for padding.

    inputs: t, what enters the MoE block. received: the attention that later tokens and itself pay to token j, mean over heads;
    see `attention.received`. L - j: the tokens from j on, so that early ones do not lead by their age.
    """
    valid_BS = mask_BS.bool()
    payers_BS = valid_BS.flip(1).cumsum(1).flip(1).clamp(min=1)
    return inputs_BSH.float().abs().sum(-1) * received_BS / payers_BS * valid_BS


def most_important(importance_BS: torch.Tensor, mask_BS: torch.Tensor, share: float) -> torch.Tensor:
    """True for that share of each sequence's tokens, rounded to the nearest number, `[B, S]`; the earlier of equals."""
    valid_BS = mask_BS.bool()
    ranked_BS = importance_BS.float().masked_fill(~valid_BS, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    wanted_B1 = (share * valid_BS.sum(1, keepdim=True).double() + 0.5).floor()
    return (ranked_BS.argsort(-1) < wanted_B1) & valid_BS
