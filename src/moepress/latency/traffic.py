"""What a forward must do at the least, for the experts that its tokens really select: bytes to move, operations to compute.

A weight is read once, in the bits that it has: of the routed experts only the selected ones, of the embedding only the tokens'
rows. A key-value cache is written by a prefill, and read and written by a step of decoding. Activations are not counted: they
may stay in caches.

Legend: B sequences, S positions, L MoE layers, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import nn

from moepress.inference.packed import PackedMatrices
from moepress.pruning.policy import experts_of
from moepress.quantization.size import matrix_bytes


@dataclass(frozen=True)
class Traffic:
    """What one forward must move and compute. experts, rest, cache: bytes of the selected experts' weights, of all other
    weights, of the key-value cache. flops: operations. used: distinct experts that a MoE layer's tokens select, mean over
    layers."""

    experts: float
    rest: float
    cache: float
    flops: float
    used: float

    @property
    def bytes(self) -> float:
        return self.experts + self.rest + self.cache

    def limit_ms(self, bandwidth: float, flop_rate: float) -> float:
        """Milliseconds that a device of these rates (bytes and operations per second) needs at the least."""
        return 1e3 * max(self.bytes / bandwidth, self.flops / flop_rate)


def mean(found: list[Traffic]) -> Traffic:
    names = ("experts", "rest", "cache", "flops", "used")
    return Traffic(*(sum(getattr(one, name) for one in found) / len(found) for name in names))


@contextmanager
def selections(model) -> Iterator[list[torch.Tensor]]:
    """The list that every forward inside extends: for each MoE layer the slots that each expert gets, `[E]`, after any pruning
    policy that was attached before."""
    found: list[torch.Tensor] = []

    def see(experts, args):
        found.append(torch.bincount(args[1].reshape(-1), minlength=experts.num_experts + 1)[: experts.num_experts])

    handles = [experts.register_forward_pre_hook(see) for experts in experts_of(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Parts:
    """Bytes and multiplications of a loaded model's parts.

    expert_bytes `[L][E]`; expert_weights `[L]`: of one expert, each multiplied once for a token. rest_bytes: of everything else
    but an embedding that is only looked up, of which row_bytes are a token's. dense_weights: of the layers, outside the
    experts."""

    def __init__(self, model):
        self.heads = model.config.num_attention_heads
        experts = experts_of(model)
        self.expert_bytes = [expert_bytes(module) for module in experts]
        self.expert_weights = [expert_weights(module) for module in experts]
        inside = {id(part) for module in experts for part in module.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        self.dense_weights = sum(
            matrix_weights(module) for layer in model.model.layers for module in layer.modules() if id(module) not in inside
        )
        head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
        self.head_weights = getattr(head, "weight", torch.empty(0)).numel()
        self.row_bytes = table.shape[1] * table.element_size()
        tensors = {id(tensor): tensor.nbytes for module in outside for tensor in own_tensors(module)}
        if getattr(head, "weight", None) is not table:
            del tensors[id(table)]
        self.rest_bytes = sum(tensors.values()) + sum(packed_bytes(m) for m in outside if isinstance(m, PackedMatrices))

    def of_forward(self, counts_LE: list[torch.Tensor], shape: Sequence[int], past: int, cache) -> Traffic:
        """counts: as `selections` has them. shape: (B, S) of the forward, behind `past` positions; cache: as it left it."""
        B, S = shape
        experts, used, flops = 0, 0, 2 * B * (S * self.dense_weights + self.head_weights)
        for counts_E, sizes_E, weights in zip(counts_LE, self.expert_bytes, self.expert_weights, strict=True):
            counts = counts_E.tolist()
            experts += sum(size for count, size in zip(counts, sizes_E, strict=True) if count)
            used += sum(count > 0 for count in counts)
            flops += 2 * sum(counts) * weights
        cached = 0
        for layer in cache.layers:
            kept = states(layer)
            cached += sum(tensor.nbytes for tensor in kept)
            if not hasattr(layer, "keys"):  # every position decays the state, adds to it and reads it
                flops += 6 * S * sum(tensor.numel() for tensor in kept)
                continue
            window = getattr(layer, "sliding_window", None) or inf
            pairs = sum(min(past + i + 1, window) for i in range(S))
            flops += 2 * B * self.heads * pairs * (layer.keys.shape[-1] + layer.values.shape[-1])
        return Traffic(experts, self.rest_bytes + B * S * self.row_bytes, cached, flops, used / max(1, len(counts_LE)))


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module without its children's; not those whose size `packed_bytes` tells."""
    packed = ("codes", "zeros", "scales") if isinstance(module, PackedMatrices) else ()
    named = [*module._parameters.items(), *module._buffers.items()]
    return [tensor for name, tensor in named if tensor is not None and name not in packed]


def packed_bytes(matrices: PackedMatrices) -> int:
    """As the format has it, however a kernel may have laid them out."""
    return sum(matrix_bytes(matrices.rows, matrices.columns, bits, matrices.group_size) for bits in matrices.bits)


def expert_bytes(experts) -> list[int]:
    """Bytes of each routed expert of a layer, packed or not."""
    found = [sum(tensor.nbytes for tensor in own_tensors(experts)) // experts.num_experts] * experts.num_experts
    for part in experts.modules():
        if isinstance(part, PackedMatrices):
            sizes = (matrix_bytes(part.rows, part.columns, bits, part.group_size) for bits in part.bits)
            found = [known + size for known, size in zip(found, sizes, strict=True)]
    return found


def expert_weights(experts) -> int:
    """Weights of the matrices of one routed expert of a layer."""
    packed = sum(part.rows * part.columns for part in experts.modules() if isinstance(part, PackedMatrices))
    return packed + sum(t.numel() for t in own_tensors(experts) if t.dim() == 3) // experts.num_experts


def matrix_weights(module: nn.Module) -> int:
    """Weights of a module's own matrix."""
    if isinstance(module, PackedMatrices):
        return module.rows * module.columns
    return sum(tensor.numel() for tensor in module._parameters.values() if tensor is not None and tensor.dim() == 2)


def weight_bytes(model) -> int:
    """Bytes of parameters and buffers as they lie in memory."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def cache_bytes(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in states(layer))


def states(layer) -> list[torch.Tensor]:
    """What a layer's cache holds: keys and values, or of linear attention the running states, whose size is fixed."""
    if hasattr(layer, "keys"):
        return [layer.keys, layer.values]
    return [tensor for kind in (layer.conv_states, layer.recurrent_states) for tensor in kind.values() if tensor is not None]
