"""The layer loop: quantize a model from its first decoder layer to its last, on two streams of hidden states.

`x` runs through the original model, `x_hat` through the model compressed so far. For each layer (QESC, EAC-MoE,
arXiv 2508.01625): quantize the attention with the curvature that `x_hat` gives; re-fit the router so that it selects on
`x_hat` what the original selects on `x`; quantize the experts with the tokens that the fitted router sends them, and shared
experts and dense layers with all tokens; push both streams on. (A router that is fitted after the experts sees the same
`x_hat`: what differs is which tokens the experts were quantized with.) GPTQ is the same without the fit, and `x` follows some
sequences alone, for the diagnostics; RTN reads no text and has no streams.

Legend: N sequences, S positions, T = N * S tokens, H hidden size, E experts, K selected experts, L layers.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moepress.inference.packed import PackedExperts, PackedLinear
from moepress.models.experts import Experts
from moepress.models.families import layer_prefix
from moepress.models.limits import TOKENS_AT_ONCE, WORKSPACE, fits_router, followed, num_candidates
from moepress.models.streaming import DTYPES, ModelStream, Routing
from moepress.models.streams import Streams
from moepress.quantization.experts import ExpertInputs, Recipe, quantize_experts
from moepress.quantization.gptq import Curvature
from moepress.quantization.router import Fit, Tokens, candidates, shift
from moepress.quantization.tuning import Tuned, tune

STREAMS = ("x", "x_hat")


@dataclass
class LayerResult:
    """tensors: the layer's, by module name, packed or 16-bit. modules: module name -> bits.

    diagnostics: layer, its number; where text is read output_error, `|x_hat - x|^2 / |x|^2` of what leaves the whole quantized
    layer, over the sequences that both streams have; where the layer is tuned tuning_error, the tuning's relative error, mean
    over the first and the last tenth of its steps. Of a MoE layer also bits, of each expert; and where text is read, all from
    before the tuning: tokens, of each expert; starved, experts with fewer tokens than inputs; expert_errors, see
    `ExpertInputs.output_error`; selection_shift, the share of selected slots that differ from the 16-bit model's,
    selection_shift_before_fit, the same without any fit; where the router is fitted router_loss and router_loss_before_fit.
    """

    index: int
    tensors: dict[str, torch.Tensor]
    modules: dict[str, int | list[int]]
    diagnostics: dict


@torch.no_grad()  # and not inference mode: tuning needs gradients of what is made here
def quantize_model(
    stream: ModelStream,
    tokens_NS: torch.Tensor | None,
    bits_LE: list[list[int]],
    recipe: Recipe,
    folder: Path | None = None,
    coverage: str = "routed",
) -> Iterator[LayerResult]:
    """Every layer's result in turn; one is whole, and never done again, when the next is asked for.

    tokens: `[N, S]`, None for RTN. bits: a width for every expert of every MoE layer. folder: where the hidden states live,
    and where a killed run finds the layer to go on from; a temporary one by default.
    """
    bits_of = dict(zip(stream.shape.moe_layers, bits_LE, strict=True))
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        size = (0, 0) if tokens_NS is None else tokens_NS.shape
        streams = Streams(Path(place), STREAMS, (*size, stream.shape.hidden_size))
        if streams.layer == 0 and tokens_NS is not None:
            streams["x_hat"].copy_(stream.embed(tokens_NS, streams["x"]))
        for index, layer in stream.layers(streams.layer):
            result = LayerQuantizer(stream, layer, index, recipe, None if tokens_NS is None else streams, coverage).run(
                bits_of.get(index)
            )
            yield result
            del result  # with its tensors, before the next layer's are read
            streams.advance()


class LayerQuantizer:
    """One decoder layer on its way from 16 bits to packed; `layer` ends with the quantized weights in it."""

    def __init__(
        self, stream: ModelStream, layer: nn.Module, index: int, recipe: Recipe, streams: Streams | None, coverage: str
    ):
        self.stream, self.layer, self.index, self.recipe = stream, layer, index, recipe
        self.streams, self.coverage = streams, coverage
        self.followed = slice(None, None, followed(vars(recipe)))
        self.prefix = layer_prefix(index)
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: dict[str, int | list[int]] = {}
        self.diagnostics: dict = {"layer": index}
        self.router_when = recipe.router_when if fits_router(vars(recipe)) else "never"

    def run(self, bits: list[int] | None) -> LayerResult:
        """bits: of each expert; None for a dense layer."""
        stream, layer, streams = self.stream, self.layer, self.streams
        routing = original_routing = target = None
        if streams:
            x, x_next, m = (part[self.followed] for part in (streams["x"], streams.next("x"), streams.scratch("m")))
            stream.attend(self.index, layer, x, x_next, m)
            original_routing = stream.route(layer, m) if bits else None
            stream.add_block(layer, x_next, m)
            x_hat, x_hat_next, m_hat = streams["x_hat"], streams.next("x_hat"), streams.scratch("m_hat")
            target = self.tuning_target(x_hat, x_next, m_hat) if self.recipe.tune_steps else None

        self.quantize_linears("attention", lambda: stream.attend(self.index, layer, x_hat, x_hat_next, m_hat))
        if streams:
            stream.attend(self.index, layer, x_hat, x_hat_next, m_hat)
            if original_routing:
                routing = self.calibrate_router(m_hat, original_routing, self.router_when in ("before", "both"))
        self.quantize_linears("shared", lambda: self.see_block(m_hat, bits))
        if bits:
            m_hat_TH = m_hat.flatten(0, 1) if streams else None
            m_TH = m.flatten(0, 1) if streams and self.recipe.asymmetry else None
            self.quantize_experts(bits, m_hat_TH, m_TH, routing)
            if original_routing and self.router_when in ("after", "both"):
                self.calibrate_router(m_hat, original_routing, fits=True)
        if target is not None:
            self.tune(x_hat, target)
            stream.attend(self.index, layer, x_hat, x_hat_next, m_hat)
        self.keep_rest()
        if streams:
            stream.add_block(layer, x_hat_next, m_hat)
            self.diagnostics["output_error"] = relative_error(x_next, x_hat_next[self.followed])
        return LayerResult(self.index, self.tensors, self.modules, self.diagnostics)

    def see_block(self, m_hat: torch.Tensor, is_moe) -> None:
        """Run the block's linears on its input, without the routed experts where it has some."""
        if is_moe:
            self.stream.route(self.layer, m_hat)
        else:
            self.stream.run_block(self.layer, m_hat)

    def quantize_linears(self, kind: str, run: Callable) -> None:
        """The layer's linears of a kind, with the curvature of what they see during `run`."""
        bits = getattr(self.recipe, f"{kind}_bits")
        linears = self.stream.linears(self.layer, kind, self.recipe.group_size) if bits else {}
        curvatures = linear_curvatures(linears, run) if self.streams and linears else {}
        for name, linear in linears.items():
            quantized = self.recipe.quantize(linear.weight[None], curvatures.get(name), [bits])
            self.tensors |= {f"{self.prefix}{name}.{part}": tensor for part, tensor in quantized.pack().items()}
            self.modules[self.prefix + name] = bits
            if self.recipe.tune_steps:
                packed = PackedLinear(linear, bits, self.recipe.group_size)
                for part, tensor in quantized.pack().items():
                    packed.get_buffer(part).copy_(tensor)
                self.layer.set_submodule(name, packed)
            else:
                linear.weight.copy_(quantized.dequantize(self.stream.dtype)[0])

    def calibrate_router(self, m_hat: torch.Tensor, original: Routing, fits: bool) -> Routing:
        """The layer's routing from here on, its router fitted or as it is."""
        routing, told = self.stream.route(self.layer, m_hat), self.diagnostics
        told.setdefault("selection_shift_before_fit", self.selection_shift(original, routing))
        if fits:
            self.fit_router(m_hat.flatten(0, 1), original, routing)
            routing = self.stream.route(self.layer, m_hat)
        told["selection_shift"] = self.selection_shift(original, routing)
        return routing

    def selection_shift(self, original: Routing, routing: Routing) -> float:
        """Share of the selections that differ, over the sequences that both streams have."""
        assert self.streams is not None
        indices_NSK = routing.indices.unflatten(0, self.streams.shape[:2])
        return shift(original.indices, indices_NSK[self.followed].flatten(0, 1)).mean().item()

    def fit_router(self, m_hat_TH: torch.Tensor, original: Routing, routing: Routing) -> None:
        """Fit the router, in the values that its dtype on disk holds."""
        stream, recipe, weight = self.stream, self.recipe, self.stream.router_weight(self.layer)
        E = weight.shape[0]
        count = E if recipe.router_loss == "mse" else num_candidates(E, recipe.router_candidates)
        mask_TE = candidates(stream.selection_scores(self.layer, original.logits.to(stream.device)), count)
        tokens = Tokens(m_hat_TH, original.logits, routing.logits, mask_TE, TOKENS_AT_ONCE, WORKSPACE, stream.device)
        name = f"{stream.family.router_path}.{stream.family.router_weight}"
        stored = stream.entries[stream.layer_names(self.index)[name]]
        how = Fit(
            recipe.router_loss,
            recipe.router_ridge,
            recipe.router_learning_rate,
            recipe.router_steps,
            recipe.router_batch,
            stream.family.scores,
        )
        fitted, before, after = how.run(tokens, weight, DTYPES[stored.dtype])
        self.diagnostics.setdefault("router_loss_before_fit", before)
        self.diagnostics["router_loss"] = after
        self.tensors[self.prefix + name] = fitted.cpu()
        weight.copy_(fitted.to(stream.dtype))

    def quantize_experts(self, bits: list[int], m_hat_TH, m_TH, routing: Routing | None) -> None:
        """Pack the experts and put them in the layer as inference will have them. m_hat, m: the block's input in the quantized
        and, for an asymmetric target, in the original stream, `[T, H]`; None, as the routing, where no text is read."""
        name = self.stream.family.experts
        experts = self.layer.get_submodule(name)
        assert isinstance(experts, Experts)
        inputs = ExpertInputs(experts, m_hat_TH, routing, self.coverage, self.stream.device, m_TH) if routing else None
        packed, errors = quantize_experts(self.recipe, experts, bits, inputs)
        module = PackedExperts(experts, bits, self.recipe.group_size, self.stream.device)
        for part, tensor in packed.items():
            module.get_buffer(part).copy_(tensor)
        self.layer.set_submodule(name, module)
        self.tensors |= {f"{self.prefix}{name}.{part}": tensor for part, tensor in packed.items()}
        self.modules[self.prefix + name] = list(bits)
        self.diagnostics["bits"] = list(bits)
        if inputs:
            self.diagnostics["tokens"] = inputs.num_tokens
            self.diagnostics["starved"] = [e for e, n in enumerate(inputs.num_tokens) if n < experts.hidden_size]
            self.diagnostics["expert_errors"] = errors

    def tuning_target(self, x_hat: torch.Tensor, x_next: torch.Tensor, m_hat: torch.Tensor) -> torch.Tensor:
        """The target of the layer's tuning, `[N, S, H]`: the 16-bit layer's output on the quantized stream, moved by the share
        `tune_asymmetry` towards its output on its own stream (x_next)."""
        assert self.streams is not None
        target = self.streams.scratch("target")
        self.stream.attend(self.index, self.layer, x_hat, target, m_hat)
        self.stream.add_block(self.layer, target, m_hat)
        if self.recipe.tune_asymmetry:
            target.lerp_(x_next, self.recipe.tune_asymmetry)
        return target

    def tune(self, x_hat: torch.Tensor, target: torch.Tensor) -> None:
        """Tune the layer's scales with its codes fixed, and where the recipe says so all its vectors (norms, biases, sinks) and
        its router."""
        stream, recipe, names = self.stream, self.recipe, self.stream.layer_names(self.index)
        router = f"{stream.family.router_path}.{stream.family.router_weight}"
        rest = {n: p for n, p in self.layer.named_parameters() if n in names and (p.dim() == 1 or n == router)}
        tuned = Tuned(self.layer, rest if recipe.tune_rest else {})
        steps = (recipe.tune_steps, recipe.tune_tokens, recipe.tune_rate)
        errors = tune(stream, self.index, self.layer, x_hat, target, tuned, *steps)
        dtypes = {name: DTYPES[stream.entries[names[name]].dtype] for name in tuned.rest}
        self.tensors |= {self.prefix + name: tensor.cpu() for name, tensor in tuned.finish(dtypes).items()}
        tenth = -(-len(errors) // 10)
        self.diagnostics["tuning_error"] = [sum(part) / tenth for part in (errors[:tenth], errors[-tenth:])]

    def keep_rest(self) -> None:
        """Copy the tensors that are not quantized as they are stored. They are the only ones that are read a second time."""
        names = {self.prefix + name: on_disk for name, on_disk in self.stream.layer_names(self.index).items()}
        done = {*self.tensors, *(f"{module}.weight" for module in self.modules)}
        kept = {name: on_disk for name, on_disk in names.items() if name not in done}
        found = self.stream.read_dense(list(kept.values()))
        self.tensors |= {name: found[on_disk] for name, on_disk in kept.items()}


def linear_curvatures(linears: dict[str, nn.Linear], run: Callable) -> dict[str, torch.Tensor]:
    """Curvature `[1, I, I]` of each linear's input during `run`; linears that are given the same tensor share one."""
    found: dict[str, Curvature] = {}
    leader: dict[str, str] = {}
    given: list[tuple[torch.Tensor, str]] = []  # held, so that no two tensors of the first forward have one address

    def watch(name):
        def see(linear, args):
            if name not in leader:
                leader[name] = next((other for tensor, other in given if tensor is args[0]), name)
                given.append((args[0], name))
                if leader[name] == name:
                    found[name] = Curvature(1, linear.in_features, args[0].device)
            elif given:
                given.clear()
            if leader[name] == name:
                found[name].add(0, args[0].flatten(0, -2))

        return see

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: curvature.mean() for name, curvature in found.items()}
    return {name: means[leader[name]] for name in linears}


def relative_error(x_NSH: torch.Tensor, x_hat_NSH: torch.Tensor) -> float:
    """`|x_hat - x|^2 / |x|^2`."""
    pairs = list(zip(x_NSH.unbind(), x_hat_NSH.unbind(), strict=True))
    error = sum((x_hat - x).square().sum().item() for x, x_hat in pairs)
    return error / sum(x.square().sum().item() for x, _ in pairs)
