"""The layer loop: quantize a model from its first decoder layer to its last, on two streams of hidden states.

`x` runs through the original model, `x_hat` through the model compressed so far. For each layer (QESC, EAC-MoE,
arXiv 2508.01625): quantize the attention with the curvature that `x_hat` gives; re-fit the router so that it selects on
`x_hat` what the original selects on `x`; quantize the experts with the tokens that the fitted router sends them; push both
streams on. GPTQ is the same without the fit; RTN reads no text and has no streams.

Legend: N sequences, S positions, T = N * S tokens, H hidden size, E experts, K selected experts, L layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moepress.models.streaming import ModelStream
from moepress.quantization import grid
from moepress.quantization.gptq import Curvature, gptq, inverse_factor, output_error, shrunk
from moepress.quantization.packing import Quantized
from moepress.quantization.router import RouterFit, num_candidates, shift

TOKENS_AT_ONCE = 4096
"""Tokens in one step through the MoE block or into the router fit."""


@dataclass(frozen=True)
class Recipe:
    """How to quantize; the fields are those of conf/quantization/."""

    method: str
    group_size: int
    clip_min: float
    clip_steps: int
    fit_rounds: int
    attention_bits: int | None = None
    damping: float = 0.0
    block_size: int = 0
    router_candidates: int | None = None
    router_ridge: float = 0.0

    def quantize(self, w_EOI: torch.Tensor, h_EII: torch.Tensor | None, bits: list[int], factor=None) -> Quantized:
        how = grid.Search(self.clip_min, self.clip_steps, self.fit_rounds)
        if h_EII is None:
            return grid.rtn(w_EOI, bits, self.group_size, how)
        block_size = math.gcd(self.block_size, self.group_size)
        return gptq(w_EOI, h_EII, bits, self.group_size, self.damping, how, block_size, factor)


@dataclass
class LayerResult:
    """tensors: the layer's, by module name, packed or 16-bit. modules: module name -> bits. x, x_hat: the streams after it."""

    index: int
    tensors: dict[str, torch.Tensor]
    modules: dict[str, int | list[int]]
    diagnostics: dict
    x: torch.Tensor | None
    x_hat: torch.Tensor | None


class ExpertInputs:
    """What a layer's experts see: each one's tokens, and the curvatures their quantization needs."""

    def __init__(self, experts, x_TH: torch.Tensor, index_TK: torch.Tensor):
        self.experts, self.x_TH = experts, x_TH
        self.rows = [(index_TK == e).any(-1).nonzero()[:, 0] for e in range(experts.num_experts)]
        self.num_tokens = [len(rows) for rows in self.rows]

    def hidden(self, gate_up_OH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The input of an expert's down projection for some tokens, `[rows, I]`."""
        gate, up = torch.nn.functional.linear(self.x_TH[rows], gate_up_OH).chunk(2, dim=-1)
        return self.experts.act_fn(gate) * up

    def gate_up_curvature(self) -> torch.Tensor:
        """`[E, H, H]`: of each expert's own tokens, shrunk towards that of all tokens."""
        E, H = len(self.rows), self.x_TH.shape[1]
        routed, layer = Curvature(E, H, self.x_TH.device), Curvature(1, H, self.x_TH.device)
        layer.add(0, self.x_TH)
        for e, rows in enumerate(self.rows):
            routed.add(e, self.x_TH[rows])
        return shrunk(routed, layer)

    def down_curvature(self, gate_up_EOH: torch.Tensor) -> torch.Tensor:
        """`[E, I, I]`: as above with the (quantized) gate and up; the layer's share comes from an even sample of all tokens,
        since each expert has neurons of its own."""
        E, I = len(self.rows), gate_up_EOH.shape[1] // 2
        routed, layer = Curvature(E, I, self.x_TH.device), Curvature(E, I, self.x_TH.device)
        T = self.x_TH.shape[0]
        sample = torch.arange(0, T, max(1, T // I), device=self.x_TH.device)
        for e, rows in enumerate(self.rows):
            routed.add(e, self.hidden(gate_up_EOH[e], rows))
            layer.add(e, self.hidden(gate_up_EOH[e], sample))
        return shrunk(routed, layer)


def quantize_experts(
    recipe: Recipe, inputs: ExpertInputs, bits: list[int], gate_up_curvature=None, gate_up_factor=None
) -> tuple[Quantized, Quantized, torch.Tensor]:
    """Gate-up and down projections of all experts, expert e to bits[e], and the relative output error of each expert's
    down projection `[E]`. The curvature and its factor can be given where several widths share them."""
    experts = inputs.experts
    if gate_up_curvature is None:
        gate_up_curvature = inputs.gate_up_curvature()
    gate_up = recipe.quantize(experts.gate_up_proj, gate_up_curvature, bits, gate_up_factor)
    down_curvature = inputs.down_curvature(gate_up.dequantize())
    down = recipe.quantize(experts.down_proj, down_curvature, bits)
    return gate_up, down, output_error(experts.down_proj, down.dequantize(), down_curvature)


def rtn_experts(recipe: Recipe, experts, bits: list[int]) -> tuple[Quantized, Quantized]:
    return tuple(recipe.quantize(w, None, bits) for w in (experts.gate_up_proj, experts.down_proj))


def block_output(block, m_NSH: torch.Tensor) -> torch.Tensor:
    """The MoE block over all sequences, some at a time."""
    at_once = max(1, TOKENS_AT_ONCE // m_NSH.shape[1])
    return torch.cat([block(part) for part in m_NSH.split(at_once)])


def linear_curvatures(stream: ModelStream, layer, x_NSH: torch.Tensor, positions) -> dict[str, torch.Tensor]:
    """Curvature `[1, I, I]` of each attention linear's input while `x` runs through the attention."""
    linears = stream.attention_linears(layer)
    found = {name: Curvature(1, linear.in_features, x_NSH.device) for name, linear in linears.items()}

    def watch(name):
        return lambda _, args: found[name].add(0, args[0].flatten(0, -2))

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        stream.attend(layer, x_NSH, positions)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: curvature.mean() for name, curvature in found.items()}


def fit_router(stream: ModelStream, layer, m_TH: torch.Tensor, m_hat_TH: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The re-fitted router `[E, H]`, in the values that the checkpoint's dtype holds."""
    weight = stream.module(layer, "router").weight
    fit = RouterFit(weight, num_candidates(weight.shape[0], recipe.router_candidates))
    for x, x_hat in zip(m_TH.split(TOKENS_AT_ONCE), m_hat_TH.split(TOKENS_AT_ONCE), strict=True):
        fit.add(x, x_hat)
    return fit.solve(recipe.router_ridge).to(stream.storage_dtype).to(stream.dtype)


def quantize_layer(stream, layer, index: int, bits: list[int], recipe: Recipe, x, x_hat, positions) -> LayerResult:
    """One decoder layer; `layer` ends with the quantized weights in it. x, x_hat: `[N, S, H]`, or None for RTN."""
    block, experts = stream.module(layer, "moe"), stream.module(layer, "experts")
    prefix = f"model.layers.{index}."
    tensors, modules, diagnostics = {}, {}, {"layer": index, "bits": list(bits)}

    def keep(name: str, quantized: Quantized) -> torch.Tensor:
        tensors.update({f"{prefix}{name}.{part}": tensor for part, tensor in quantized.pack().items()})
        return quantized.dequantize(stream.dtype)

    if x is not None:
        residual, m = stream.attend(layer, x, positions)
        x_next = residual + block_output(block, m)
        selected = stream.route(layer, m.flatten(0, 1))[2]

    linears = stream.attention_linears(layer) if recipe.attention_bits else {}
    curvatures = linear_curvatures(stream, layer, x_hat, positions) if linears and x is not None else {}
    for name, linear in linears.items():
        quantized = recipe.quantize(linear.weight[None], curvatures.get(name), [recipe.attention_bits])
        linear.weight.copy_(keep(name, quantized)[0])
        modules[prefix + name] = recipe.attention_bits

    if x is None:
        gate_up, down = rtn_experts(recipe, experts, bits)
    else:
        residual_hat, m_hat = stream.attend(layer, x_hat, positions)
        m_TH, m_hat_TH = m.flatten(0, 1), m_hat.flatten(0, 1)
        changed = shift(selected, stream.route(layer, m_hat_TH)[2]).mean().item()
        diagnostics["selection_shift_before_fit"] = diagnostics["selection_shift"] = changed
        if recipe.method == "qesc":
            stream.module(layer, "router").weight.copy_(fit_router(stream, layer, m_TH, m_hat_TH, recipe))
        selected_hat = stream.route(layer, m_hat_TH)[2]
        diagnostics["selection_shift"] = shift(selected, selected_hat).mean().item()
        inputs = ExpertInputs(experts, m_hat_TH, selected_hat)
        gate_up, down, errors = quantize_experts(recipe, inputs, bits)
        diagnostics["tokens"] = inputs.num_tokens
        diagnostics["starved"] = [e for e, n in enumerate(inputs.num_tokens) if n < m.shape[-1]]
        diagnostics["expert_errors"] = errors.tolist()
    experts.gate_up_proj.copy_(keep(f"{stream.family.experts}.gate_up", gate_up))
    experts.down_proj.copy_(keep(f"{stream.family.experts}.down", down))
    modules[prefix + stream.family.experts] = list(bits)

    replaced = {f"{name}.weight" for name in linears} | {
        f"{stream.family.experts}.{matrix}" for matrix in ("gate_up_proj", "down_proj")
    }
    for name, tensor in layer.state_dict().items():
        if name not in replaced:
            tensors[prefix + name] = tensor.to(stream.storage_dtype)

    if x is not None:
        x, x_hat = x_next, residual_hat + block_output(block, m_hat)
        diagnostics["output_error"] = ((x_hat - x).square().sum() / x.square().sum()).item()
    return LayerResult(index, tensors, modules, diagnostics, x, x_hat)


@torch.inference_mode()
def quantize_model(
    stream: ModelStream,
    tokens_NS: torch.Tensor | None,
    bits_LE: list[list[int]],
    recipe: Recipe,
    start: int = 0,
    streams=None,
) -> Iterator[LayerResult]:
    """Every layer's result in turn, from layer `start` with the streams `(x, x_hat)` that entered it.

    tokens: `[N, S]`, None for RTN. bits: a width for every expert of every layer.
    """
    x = x_hat = positions = None
    if tokens_NS is not None:
        x, x_hat = streams or (stream.embed(tokens_NS),) * 2
        positions = stream.positions(tokens_NS.shape[1])
    for index, layer in stream.layers(start):
        result = quantize_layer(stream, layer, index, bits_LE[index], recipe, x, x_hat, positions)
        x, x_hat = result.x, result.x_hat
        yield result


def width_errors(recipe: Recipe, inputs: ExpertInputs, weights_TE: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """PMQ's eps `[E, widths]`: Frobenius norm of the change of the MoE block's output when one expert alone is quantized
    (MC, arXiv 2410.06270). Only the expert itself runs, on its own tokens. weights: routing weights, 0 where not selected."""
    experts = inputs.experts
    curvature = factor = None
    if recipe.method != "rtn":
        curvature = inputs.gate_up_curvature()
        factor = inverse_factor(curvature, recipe.damping)
    errors = torch.zeros(experts.num_experts, len(widths))
    for column, width in enumerate(widths):
        bits = [width] * experts.num_experts
        if recipe.method == "rtn":
            gate_up, down = rtn_experts(recipe, experts, bits)
        else:
            gate_up, down, _ = quantize_experts(recipe, inputs, bits, curvature, factor)
        gate_up, down = gate_up.dequantize(), down.dequantize()
        for e, rows in enumerate(inputs.rows):
            y = inputs.hidden(experts.gate_up_proj[e], rows) @ experts.down_proj[e].T
            change = inputs.hidden(gate_up[e], rows) @ down[e].T - y
            errors[e, column] = (change * weights_TE[rows, e, None]).norm()
    return errors
