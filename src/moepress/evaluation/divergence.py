"""How far one model's predictions are from another's, whatever the text says.

Perplexity tells how well a model guesses the text. A compressed model may guess it better than the model that it was made
from and still say other things; how near it stays is told by the divergence of its predictions,

    KL(p || p_hat) = sum_v p(v) (log p(v) - log p_hat(v)),

and by how often both would go on with the same token.
"""

import torch


def divergence(logits_SV: torch.Tensor, other_SV: torch.Tensor) -> torch.Tensor:
    """`KL(p || p_hat)` at each position, in nats; `[S]`. logits: of p, the 16-bit model. Any shape in place of S."""
    log_p, log_p_hat = logits_SV.float().log_softmax(-1), other_SV.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_p_hat)).sum(-1)


def same_choice(logits_SV: torch.Tensor, other_SV: torch.Tensor) -> torch.Tensor:
    """Whether both think the same next token most likely; `[S]`."""
    return logits_SV.argmax(-1) == other_SV.argmax(-1)
