"""Quantizing one layer's routed experts: what each of them sees, and the experts in batches that fit in memory.

Legend: T tokens, H hidden size, I intermediate size, O output rows, E experts, C experts of one batch, K selected experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

from moepress.models.experts import Experts
from moepress.models.limits import TOKENS_AT_ONCE, experts_at_once
from moepress.models.streaming import Routing
from moepress.quantization import grid
from moepress.quantization.gptq import Curvature, asymmetric, gptq, inverse_factor, shrunk
from moepress.quantization.packing import Quantized
from moepress.quantization.refining import refine
from moepress.quantization.size import group_of

SAMPLE = 128
"""Tokens that an expert's output error is measured on."""


@dataclass(frozen=True)
class Recipe:
    """How to quantize; the fields are those of conf/quantization/."""

    method: str
    group_size: int
    clip_min: float
    clip_steps: int
    fit_rounds: int
    attention_bits: int | None = None
    shared_bits: int | None = None
    damping: float = 0.0
    block_size: int = 0
    router_loss: str = "topk_mse"
    router_when: str = "before"
    router_candidates: int | None = None
    router_ridge: float = 0.0
    router_learning_rate: float = 0.0
    router_steps: int = 0
    router_batch: int = 0
    clip_max: float = 1.0
    clip_ends: str = "apart"
    clip_norm: float = 2.0
    clip_weighted: bool = True
    zero_steps: int = grid.ZERO_STEPS
    one_bit: str = "grid"
    act_order: bool = False
    deferred_bits: int = 0
    asymmetry: float = 0.0
    refine_rounds: int = 0
    tune_steps: int = 0
    tune_tokens: int = 0
    tune_rate: float = 0.0
    tune_rest: bool = False
    tune_asymmetry: float = 0.0
    distill_steps: int = 0
    distill_rate: float = 0.0
    distill_sequences: int | None = None

    @property
    def search(self) -> grid.Search:
        return grid.Search(**{field.name: getattr(self, field.name) for field in fields(grid.Search)})

    def factor(self, h_EII: torch.Tensor) -> torch.Tensor | None:
        """`inverse_factor` of curvatures `[E, I, I]`, which `gptq` at every width and `asymmetric` can share; None under
        act_order, where `gptq` makes its own for the order of its columns."""
        return None if self.act_order else inverse_factor(h_EII, self.damping)

    def quantize(self, w_EOI: torch.Tensor, h_EII: torch.Tensor | None, bits: list[int], factor=None) -> Quantized:
        """Matrices `[E, O, I]` at E widths: by GPTQ and refinement with curvatures `[E, I, I]` (factor: of `self.factor`), by
        rounding to nearest without any."""
        group_size = group_of(w_EOI.shape[-1], self.group_size)
        if self.method == "minmax":
            return grid.minmax(w_EOI, bits, group_size)
        if h_EII is None:
            return grid.rtn(w_EOI, bits, group_size, self.search)
        block_size = math.gcd(self.block_size, group_size)
        order = (self.act_order, self.deferred_bits)
        found = gptq(w_EOI, h_EII, bits, group_size, self.damping, self.search, block_size, factor, *order)
        return refine(w_EOI, h_EII, found, self.damping, self.refine_rounds, self.zero_steps)


class ExpertInputs:
    """What a layer's experts see, and the curvatures that their quantization needs.

    m: the MoE block's input `[T, H]`, perhaps on disk. coverage: the tokens of an expert's curvature: `routed` to it,
    those `weighted` by the square of their routing weight (their share in the block's squared error), or `all`.
    original: the block's input in the 16-bit model, for asymmetric targets.
    """

    def __init__(
        self,
        experts: Experts,
        m_TH: torch.Tensor,
        routing: Routing,
        coverage: str,
        device: str = "cpu",
        original_TH: torch.Tensor | None = None,
    ):
        self.experts, self.m_TH, self.coverage, self.device = experts, m_TH, coverage, device
        self.original_TH = original_TH
        self.rows, self.shares = [], []
        for e in range(experts.num_experts):
            hits_TK = routing.indices == e
            rows = hits_TK.any(-1).nonzero()[:, 0]
            self.rows.append(rows)
            weight = (routing.weights * hits_TK).sum(-1)[rows].square()
            self.shares.append(weight / weight.mean().clamp(min=1e-30) if coverage == "weighted" else None)
        self.num_tokens = [len(rows) for rows in self.rows]
        self._pooled: Curvature | None = None

    def gate_up_curvature(self, batch: range) -> torch.Tensor:
        """`[C, H, H]`: of each expert's own tokens, shrunk towards that of all tokens."""
        H = self.m_TH.shape[1]
        if self._pooled is None:
            self._pooled = Curvature(1, H, self.device)
            for part in self.m_TH.split(TOKENS_AT_ONCE):
                self._pooled.add(0, part.to(self.device))
        if self.coverage == "all":
            return self._pooled.mean().expand(len(batch), H, H)
        routed = Curvature(len(batch), H, self.device)
        for i, e in enumerate(batch):
            for rows, share in self._tokens(e):
                routed.add(i, self.m_TH[rows].to(self.device), share)
        return shrunk(routed, self._pooled)

    def down_curvature(self, batch: range, gate_up_COH: torch.Tensor, kept: dict | None = None) -> torch.Tensor:
        """`[C, I, I]`: of each expert's activations with the (quantized) gate and up, from its own tokens, shrunk towards that
        from an even sample of all tokens (each expert has neurons of its own, so there is none of the layer to share). kept: a
        dict that takes the activations of the expert's own tokens under `(expert, part of its tokens)`."""
        T, I = len(self.m_TH), self.experts.intermediate_size
        routed = Curvature(len(batch), I, self.device)
        sample = torch.arange(0, T, 1 if self.coverage == "all" else max(1, T // I))
        layer = routed if self.coverage == "all" else Curvature(len(batch), I, self.device)
        for i, e in enumerate(batch):
            for rows in sample.split(TOKENS_AT_ONCE):
                layer.add(i, self.experts.hidden(e, self.m_TH[rows].to(self.device), gate_up_COH[i]))
            if self.coverage != "all":
                for part, (rows, share) in enumerate(self._tokens(e)):
                    hidden = self.experts.hidden(e, self.m_TH[rows].to(self.device), gate_up_COH[i])
                    routed.add(i, hidden, share)
                    if kept is not None:
                        kept[e, part] = hidden
        return layer.mean() if self.coverage == "all" else shrunk(routed, layer)

    def drift(self, batch: range, gate_up_COH: torch.Tensor | None = None) -> torch.Tensor:
        """GPTAQ's `D = mean (x - x_hat) x_hat^T` over the tokens of each expert's curvature: `[C, H, H]` of the block's input,
        or with the quantized gate and up `[C, I, I]` of the down projection's. Where the curvature is shrunk towards the
        layer's, D is shrunk towards 0 by the same share."""
        width = self.m_TH.shape[1] if gate_up_COH is None else self.experts.intermediate_size
        found = Curvature(len(batch), width, self.device)
        assert self.original_TH is not None
        for i, e in enumerate(batch):
            for rows, share in self._tokens(e):
                x_hat, x = (part[rows].to(self.device) for part in (self.m_TH, self.original_TH))
                if gate_up_COH is not None:
                    x_hat, x = self.experts.hidden(e, x_hat, gate_up_COH[i]), self.experts.hidden(e, x)
                found.add(i, x_hat, share, x - x_hat)
        return found.mean() if self.coverage == "all" else found.sum_EII / (found.count_E + width)[:, None, None]

    def output_error(self, e: int, gate_up_OH: torch.Tensor, down_HI: torch.Tensor) -> float:
        """`|q(x) - f(x)|^2 / |f(x)|^2` of expert e with other weights, over at most `SAMPLE` of its tokens; of all tokens where
        it has none."""
        rows = self.rows[e] if len(self.rows[e]) else torch.arange(len(self.m_TH))
        x = self.m_TH[rows[:: -(-len(rows) // SAMPLE)]].to(self.device)
        y = self.experts.output(e, x)
        return ((self.experts.output(e, x, gate_up_OH, down_HI) - y).square().sum() / y.square().sum()).item()

    def _tokens(self, e: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The tokens that an expert's curvature is of, their rows in m and their shares, some at a time."""
        rows, share = self.rows[e], self.shares[e]
        if self.coverage == "all":
            rows = torch.arange(len(self.m_TH))
        for start in range(0, len(rows), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            yield rows[part], None if share is None else share[part].to(self.device)


def expert_batches(experts: Experts) -> Iterator[range]:
    """Ranges of experts that go together: as many as the workspace holds; with progress where they take several."""
    E = experts.num_experts
    step = experts_at_once(experts.hidden_size, experts.intermediate_size, E)
    is_short = step == E
    with tqdm(total=E, desc="experts of the layer", unit="expert", leave=False, position=1, disable=is_short) as progress:
        for start in range(0, E, step):
            batch = range(start, min(start + step, E))
            yield batch
            progress.update(len(batch))


def quantize_batch(
    recipe: Recipe, experts: Experts, batch: range, bits: list[int], inputs: ExpertInputs | None, h=None, u=None, kept=None
) -> tuple[Quantized, Quantized]:
    """`(gate_up, down)` of the experts `batch`, each at its width of `bits`. inputs: None to round to nearest without
    curvature. h, u: the gate-up curvature and its factor, given where several widths share them. kept: see `down_curvature`."""

    def stacked(matrix: Callable) -> torch.Tensor:
        return torch.stack([matrix(e, torch.float32) for e in batch])

    if inputs is None:
        gate_up = recipe.quantize(stacked(experts.gate_up_matrix), None, bits)
        return gate_up, recipe.quantize(stacked(experts.down_matrix), None, bits)
    is_asymmetric = recipe.asymmetry > 0 and inputs.original_TH is not None
    h = inputs.gate_up_curvature(batch) if h is None else h
    u = recipe.factor(h) if u is None else u
    w = stacked(experts.gate_up_matrix)
    if is_asymmetric:
        w = asymmetric(w, inputs.drift(batch), h, recipe.damping, recipe.asymmetry, u)
    gate_up = recipe.quantize(w, h, bits, u)
    del w, h, u
    h = inputs.down_curvature(batch, gate_up.dequantize(), kept)
    u = recipe.factor(h)
    w = stacked(experts.down_matrix)
    if is_asymmetric:
        w = asymmetric(w, inputs.drift(batch, gate_up.dequantize()), h, recipe.damping, recipe.asymmetry, u)
    return gate_up, recipe.quantize(w, h, bits, u)


def quantize_experts(
    recipe: Recipe, experts: Experts, bits: list[int], inputs: ExpertInputs | None
) -> tuple[dict[str, torch.Tensor], list[float] | None]:
    """All of a layer's experts, expert e at bits[e]: the packed tensors by name (`gate_up.codes`, ...) and each expert's
    `ExpertInputs.output_error` (None without inputs)."""
    parts, errors = [], []
    for batch in expert_batches(experts):
        gate_up, down = quantize_batch(recipe, experts, batch, [bits[e] for e in batch], inputs)
        packed = {"gate_up": gate_up.pack(), "down": down.pack()}
        parts.append({f"{name}.{part}": tensor for name, found in packed.items() for part, tensor in found.items()})
        if inputs is not None:
            errors += [inputs.output_error(e, gate_up.matrix(i), down.matrix(i)) for i, e in enumerate(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, errors or None
