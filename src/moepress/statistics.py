"""What each expert does on the calibration text: how often and how strongly it is selected, and its errors at every width.

One pass over the original model, a layer at a time. Selection frequency phi, routing weight w, and eps, the change of the MoE
block's output when the expert alone is quantized, are MC's (arXiv 2410.06270); what else the rules of moepress.allocation read
falls off on the way.

Legend: T tokens, E experts, K selected experts, W widths, M = 2 matrices of an expert.
"""

import torch

from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.quantization.experts import ExpertInputs, Recipe
from moepress.quantization.sensitivity import Gradient, width_errors


def layer_statistics(
    stream: ModelStream,
    index: int,
    layer,
    streams: Streams,
    recipe: Recipe,
    widths: list[int],
    domains: list[str],
    coverage: str,
    gradient: Gradient | None = None,
) -> dict | None:
    """The statistics of layer `index`, None for a dense one; its output goes to `streams.next("x")`. domains: of each of the N
    sequences. Nested lists:

    tokens `[E]`, that select the expert; frequency `[E]`: their share of all tokens (sums to K); weight `[E]`: mean over all
    tokens of its routing weight as the model uses it; softmax_weight `[E]`: the same before top-k renormalisation; errors
    `[E, W]`, weight_errors `[E, W, M]`, traces `[E, M]` and, with a gradient, loss_errors `[E, W]` as `WidthErrors` has them;
    selections_by_domain `{domain: [E]}`; layer_errors `[W]`: squared change of the layer's output with all of its experts
    quantized, over the output's own square.
    """
    m = streams.scratch("m")
    stream.attend(index, layer, streams["x"], streams.next("x"), m)
    found: dict | None = None
    if index in stream.shape.moe_layers:
        m_TH = m.flatten(0, 1)
        routing = stream.route(layer, m)
        T, E = routing.logits.shape
        weights_TE = torch.zeros(T, E).scatter_(1, routing.indices, routing.weights)
        selected_TE = torch.zeros(T, E).scatter_(1, routing.indices, 1.0)
        per_sequence_NE = selected_TE.view(*m.shape[:2], E).sum(1)
        experts = layer.get_submodule(stream.family.experts)
        inputs = ExpertInputs(experts, m_TH, routing, coverage, stream.device)
        measured = width_errors(recipe, inputs, weights_TE, widths, gradient)
        found = {
            "layer": index,
            "tokens": inputs.num_tokens,
            "frequency": selected_TE.mean(0).tolist(),
            "weight": weights_TE.mean(0).tolist(),
            "softmax_weight": (stream.scores(routing.logits) * selected_TE).mean(0).tolist(),
            "errors": measured.errors_EW.tolist(),
            "weight_errors": measured.weight_errors_EWM.tolist(),
            "traces": measured.traces_EM.tolist(),
            "selections_by_domain": {
                domain: per_sequence_NE[[d == domain for d in domains]].sum(0).tolist() for domain in dict.fromkeys(domains)
            },
        }
    stream.add_block(layer, streams.next("x"), m)
    if found:
        scale = stream.block_scale(layer) ** 2
        output = streams.next("x").flatten(0, 1)[measured.sample_S].square().sum().item()
        found["layer_errors"] = (scale * measured.layer_changes_WSH.square().sum((1, 2)) / output).tolist()
        if measured.loss_errors_EW is not None:
            found["loss_errors"] = (scale * measured.loss_errors_EW).tolist()
    return found
