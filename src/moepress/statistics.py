"""What each expert does on the calibration text: how often and how strongly it is selected, and its error at every width.

One pass over the original model, a layer at a time. The quantities are MC's (arXiv 2410.06270): selection frequency phi,
routing weight w, and eps, the change of the MoE block's output when the expert alone is quantized.

Legend: T tokens, E experts, K selected experts.
"""

import torch

from moepress.models.streaming import ModelStream
from moepress.quantization.qesc import ExpertInputs, Recipe, block_output, width_errors


def layer_statistics(
    stream: ModelStream, layer, x_NSH: torch.Tensor, positions, recipe: Recipe, widths: list[int], domains: list[str]
) -> tuple[dict, torch.Tensor]:
    """`(statistics, next x)` of one layer; domains: of each of the N sequences. Lists over experts:

    tokens; frequency: share of tokens that select the expert (sums to K); weight: mean over all tokens of its routing weight
    after top-k renormalisation; softmax_weight: the same before it; errors `[E, widths]`; selections_by_domain `{domain: [E]}`.
    """
    residual, m = stream.attend(layer, x_NSH, positions)
    m_TH = m.flatten(0, 1)
    logits_TE, weights_TK, index_TK = stream.route(layer, m_TH)
    E, T = logits_TE.shape[1], len(m_TH)
    weights_TE = torch.zeros(T, E, device=m.device).scatter_(1, index_TK, weights_TK.float())
    selected_TE = torch.zeros(T, E, device=m.device).scatter_(1, index_TK, 1.0)
    per_sequence_NE = selected_TE.view(*m.shape[:2], E).sum(1)
    inputs = ExpertInputs(stream.module(layer, "experts"), m_TH, index_TK)
    found = {
        "tokens": inputs.num_tokens,
        "frequency": selected_TE.mean(0).tolist(),
        "weight": weights_TE.mean(0).tolist(),
        "softmax_weight": (logits_TE.float().softmax(-1) * selected_TE).mean(0).tolist(),
        "errors": width_errors(recipe, inputs, weights_TE, widths).tolist(),
        "selections_by_domain": {
            domain: per_sequence_NE[[d == domain for d in domains]].sum(0).tolist() for domain in dict.fromkeys(domains)
        },
    }
    return found, residual + block_output(stream.module(layer, "moe"), m)
