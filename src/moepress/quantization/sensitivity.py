"""The errors that quantization to each width causes in each expert alone: what allocation decides by.

Legend: T tokens, H hidden size, E experts, W widths, M = 2 matrices of an expert; here S is tokens of the sample (no positions)
and G tokens with a gradient (no groups).
"""

from dataclasses import dataclass

import torch

from moepress.models.limits import TOKENS_AT_ONCE, kept_bytes
from moepress.quantization.experts import ExpertInputs, Recipe, expert_batches, quantize_batch

LAYER_SAMPLE = 1024
"""Tokens that the change of a whole layer's output is measured on, at the most."""


@dataclass
class Gradient:
    """The gradient of the loss at a layer's output, g_GH, for some of its tokens. row_T: each token's row in it, -1 without
    one."""

    row_T: torch.Tensor
    g_GH: torch.Tensor


@dataclass
class WidthErrors:
    """The errors that quantization to each of W widths causes: in a layer's E experts, each alone, and in the layer.

    errors_EW: Frobenius norm of the change of the MoE block's output over all tokens (PMQ's eps; MC, arXiv 2410.06270).
    loss_errors_EW: sum over tokens of (g dz)^2, dz that change and g the gradient of the loss (GEMQ, arXiv 2605.23078); None
    without one.
    weight_errors_EWM: squared error of the weights, M = (gate and up, down). traces_EM: trace of the curvature of their inputs,
    a mean over all tokens in which those not routed to the expert count 0, divided by the input's width (HAWQ-V2, arXiv
    1911.03852).
    layer_changes_WSH: of the block's output with all experts at one width, for the tokens sample_S.
    """

    errors_EW: torch.Tensor
    loss_errors_EW: torch.Tensor | None
    weight_errors_EWM: torch.Tensor
    traces_EM: torch.Tensor
    layer_changes_WSH: torch.Tensor
    sample_S: torch.Tensor


def width_errors(
    recipe: Recipe, inputs: ExpertInputs, weights_TE: torch.Tensor, widths: list[int], gradient: Gradient | None = None
) -> WidthErrors:
    """Every expert at every width; only the expert itself runs, on its own tokens. weights: routing weights, 0 where not
    selected."""
    experts, device = inputs.experts, inputs.device
    (T, H), E, W = inputs.m_TH.shape, experts.num_experts, len(widths)
    sample_S = torch.arange(0, T, -(-T // LAYER_SAMPLE))
    place_T = torch.full((T,), -1)
    place_T[sample_S] = torch.arange(len(sample_S))
    squares, losses = torch.zeros(2, E, W, dtype=torch.float64)
    weight_errors, traces = torch.zeros(E, W, 2), torch.zeros(E, 2)
    changes = torch.zeros(W, len(sample_S), H, device=device)
    reads_text = recipe.method == "gptq"
    for batch in expert_batches(experts):
        h = inputs.gate_up_curvature(batch) if reads_text else None
        u = None if h is None else recipe.factor(h)
        read = inputs if reads_text else None
        keeps = kept_bytes(sum(inputs.num_tokens[e] for e in batch), experts.intermediate_size, W) > 0
        kept: list[dict] = [{} for _ in widths]  # inputs of the quantized down projections, from their curvatures
        found = [
            quantize_batch(recipe, experts, batch, [width] * len(batch), read, h, u, by_part if keeps else None)
            for width, by_part in zip(widths, kept, strict=True)
        ]
        for i, e in enumerate(batch):
            for column, (gate_up, down) in enumerate(found):
                weight_errors[e, column, 0] = (gate_up.matrix(i) - experts.gate_up_matrix(e, torch.float32)).square().sum()
                weight_errors[e, column, 1] = (down.matrix(i) - experts.down_matrix(e, torch.float32)).square().sum()
            for part, rows in enumerate(inputs.rows[e].split(TOKENS_AT_ONCE)):
                x, weight = inputs.m_TH[rows].to(device), weights_TE[rows, e, None].to(device)
                hidden = experts.hidden(e, x)
                output = experts.project(e, hidden)
                traces[e] += torch.stack([v.square().sum().cpu() / v.shape[1] for v in (x, hidden)]) / T
                sampled = place_T[rows] >= 0
                if gradient:
                    known = gradient.row_T[rows] >= 0
                    g = gradient.g_GH[gradient.row_T[rows[known]]].to(device, torch.float32)
                for column, (gate_up, down) in enumerate(found):
                    hidden = kept[column].pop((e, part), None)
                    hidden = experts.hidden(e, x, gate_up.matrix(i)) if hidden is None else hidden
                    change = weight * (experts.project(e, hidden, down.matrix(i)) - output)
                    squares[e, column] += change.square().sum().item()
                    changes[column].index_add_(0, place_T[rows[sampled]].to(device), change[sampled.to(device)])
                    if gradient:
                        losses[e, column] += (g * change[known.to(device)]).sum(-1).square().sum().item()
    return WidthErrors(squares.sqrt(), losses if gradient else None, weight_errors, traces, changes, sample_S)
