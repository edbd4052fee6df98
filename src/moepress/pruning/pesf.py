"""PESF, pruning by expert-selection frequency (EAC-MoE, arXiv 2508.01625): at prefill, experts that a sequence hardly selects
are left out for that sequence.

The paper leaves three things open; here: counts are per sequence and never include padding; the kept weights of a token
may be rescaled to their former sum; a token whose experts are all left out keeps its best one.

Legend: B sequences, S positions, K selected experts, E experts.
"""

import torch


def pesf(
    index_BSK: torch.Tensor,
    weights_BSK: torch.Tensor,
    mask_BS: torch.Tensor,
    num_experts: int,
    alpha: float,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(index, weights)` without the experts that fewer than `alpha * l * K / E` of a sequence's l tokens select.

    mask: True for tokens, False for padding, whose slots are emptied. An empty slot has index E and weight 0. With one
    token (decoding) nothing changes as long as `alpha * K <= E`.
    """
    B, S, K = index_BSK.shape
    valid = mask_BS.bool()
    counts_BE = torch.zeros(B, num_experts + 1, device=index_BSK.device)
    counted = torch.where(valid[..., None], index_BSK, num_experts).view(B, S * K)
    counts_BE.scatter_add_(1, counted, torch.ones_like(counted, dtype=counts_BE.dtype))
    threshold_B = alpha * valid.sum(1) * K / num_experts
    rare_BE = counts_BE[:, :num_experts] < threshold_B[:, None]
    rare_BSK = rare_BE.gather(1, index_BSK.view(B, S * K)).view(B, S, K)
    best_BSK = torch.nn.functional.one_hot(weights_BSK.argmax(-1), K).bool()
    keep_BSK = (~rare_BSK | (rare_BSK.all(-1, keepdim=True) & best_BSK)) & valid[..., None]
    kept = torch.where(keep_BSK, weights_BSK, torch.zeros_like(weights_BSK))
    if renormalize:
        kept = kept * (weights_BSK.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-20))
    return torch.where(keep_BSK, index_BSK, num_experts), kept
