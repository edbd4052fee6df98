"""The packed checkpoint before it exists: every tensor of every shard, the folder's bytes, the loaded model's bytes, and what
a budget leaves for the experts. Plain arithmetic on an `Outline`: imports no torch."""

import json
import math
from collections import Counter
from functools import cached_property

from moepress.inference import manifest
from moepress.models.families import FAMILIES, Family, group_of, in_layer, kind_of, layer_prefix, module_name
from moepress.models.files import Entry
from moepress.models.outline import Outline
from moepress.quantization.size import expert_bytes, feasible_range, packed_bytes, zero_width
from moepress.schema.values import WIDTHS, parse_bytes
from moepress.wording import readable

ORDER = ("F64", "F32", "BF16", "F16", "I8", "U8", "BOOL")
"""Of dtypes in a safetensors file."""


HEAD = "lm_head.weight"


def shard_name(index: int, num_layers: int) -> str:
    return f"model-{index + 1:05d}-of-{num_layers + 1:05d}.safetensors"


class Prediction:
    """What `quantization` (as in conf/quantization/) makes of a model, whatever widths its experts get.

    Its methods take these widths, `bits_LE`: a list over experts for every MoE layer.
    """

    def __init__(self, outline: Outline, quantization: dict):
        self.outline, self.shape, self.group_size = outline, outline.shape, quantization["group_size"]
        self.quantization, self.family = quantization, FAMILIES[self.shape.family]

    @cached_property
    def fixed(self) -> tuple[list[dict[str, Entry]], dict[str, int]]:
        """The shards without routed experts, one per decoder layer and one for the rest; and their packed modules' bits."""
        shards: list[dict[str, Entry]] = [{} for _ in range(self.shape.num_layers + 1)]
        modules: dict[str, int] = {}
        for name, entry in self.outline.tensors.items():
            kind = kind_of(self.family, name, entry.shape, self.group_size)
            if kind == "expert" or (name == HEAD and self.outline.is_tied):
                continue
            inside, shard = in_layer(name), shards[-1]
            if inside is not None:
                index = int(name.split(".")[2])
                shard, name = shards[index], layer_prefix(index) + module_name(self.family, inside)
            bits = self.quantization.get(f"{kind}_bits")
            if bits:
                name = name.removesuffix(".weight")
                modules[name] = bits
                rows, columns = entry.shape
                shard |= packed_entries(name, rows, columns, [bits], self.group_size)
            else:
                shard[name] = Entry(None, name, entry.dtype, entry.shape)
        return shards, modules

    def experts(self, layer: int) -> str:
        return layer_prefix(layer) + self.family.experts

    def shards(self, bits_LE: list[list[int]]) -> list[dict[str, Entry]]:
        """Every tensor of every shard by its name."""
        H, I = self.shape.hidden_size, self.shape.intermediate_size
        found = [dict(shard) for shard in self.fixed[0]]
        for layer, bits in zip(self.shape.moe_layers, bits_LE, strict=True):
            found[layer] |= packed_entries(f"{self.experts(layer)}.gate_up", 2 * I, H, bits, self.group_size)
            found[layer] |= packed_entries(f"{self.experts(layer)}.down", H, I, bits, self.group_size)
        return found

    def weight_bytes(self, bits_LE: list[list[int]]) -> int:
        """Bytes of the shards, headers included."""
        return sum(file_bytes(shard) for shard in self.shards(bits_LE))

    def folder_bytes(self, bits_LE: list[list[int]]) -> int:
        """Bytes of the whole folder: shards, index, configuration with every module's bits, tokenizer, moepress's records."""
        num_layers = self.shape.num_layers
        shards = {shard_name(i, num_layers): shard for i, shard in enumerate(self.shards(bits_LE))}
        files = {name: size for name, size in self.outline.files.items() if name in manifest.BESIDE}
        files |= {name: file_bytes(shard) for name, shard in shards.items()}
        files["config.json"] = json_bytes(self.checkpoint_config(bits_LE))
        total = sum(entry.nbytes for shard in shards.values() for entry in shard.values())
        known = {name: {"bytes": size, "sha256": "0" * 64} for name, size in files.items()}
        where = {name: shard for shard, tensors in shards.items() for name in tensors}
        index = {"metadata": {"total_size": total, "files": known}, "weight_map": where}
        return sum(files.values()) + json_bytes(index) + self.record_bytes()

    def checkpoint_config(self, bits_LE: list[list[int]]) -> dict:
        """config.json as the checkpoint has it."""
        widths = {self.experts(layer): bits for layer, bits in zip(self.shape.moe_layers, bits_LE, strict=True)}
        return manifest.packed_config(self.outline.config, self.group_size, self.fixed[1] | widths)

    def record_bytes(self) -> int:
        """About what provenance.json (a line for every file), diagnostics.json and card.json (for every layer and expert) and
        README.md take: some KiB, unlike everything else here not counted to the byte."""
        num_experts = len(self.shape.moe_layers) * self.shape.num_experts
        return 6000 + 470 * self.shape.num_layers + 60 * num_experts

    def loaded_bytes(self, bits_LE: list[list[int]], device: str) -> int:
        """Bytes of the loaded model's parameters and buffers: what is not packed is float32 on "cpu", as stored on "cuda"."""
        return sum(loaded(entry, device) for shard in self.shards(bits_LE) for entry in shard.values())

    def tuning_bytes(self, tokens: int) -> int:
        """Bytes that the tuning of the whole packed model (distilling.py) needs beside that model, whatever its widths.
        tokens: of one step.

        All float32. For each group of weights, in place of its 16-bit scale: scale, factor, their product, the factor's
        gradient and Adam's two moments; for each weight of norms and routers what it was, gradient and moments; the 16-bit
        model's head. Of a step: six times the logits, what enters each layer, one layer's activations; one expert and one
        layer's linears unpacked, each three times.
        """
        shape, narrow = self.shape, [[1] * self.shape.num_experts] * len(self.shape.moe_layers)
        entries = [entry for shard in self.shards(narrow) for entry in shard.values()]
        groups = sum(entry.numel for entry in entries if entry.name.endswith(".scales"))
        rest = sum(entry.numel for entry in entries if is_distilled(self.family, entry.name))
        head = shape.vocab_size * shape.hidden_size
        activations = 24 * shape.hidden_size + 8 * shape.top_k * shape.intermediate_size
        step = tokens * (6 * shape.vocab_size + shape.num_layers * shape.hidden_size + activations)
        unpacked = 3 * (self.outline.expert_weights + self.widest_linears())
        return 22 * groups + 16 * rest + 4 * (head + step + unpacked)

    def widest_linears(self) -> int:
        """Weights of the packed linears outside the experts, of the layer that has most of them."""
        found: Counter = Counter()
        for name, entry in self.outline.tensors.items():
            kind = kind_of(self.family, name, entry.shape, self.group_size)
            if kind != "expert" and self.quantization.get(f"{kind}_bits"):
                found[name.split(".")[2]] += entry.numel
        return max(found.values(), default=0)


def packed_entries(name: str, rows: int, columns: int, bits: list[int], group_size: int) -> dict[str, Entry]:
    """The three tensors of packed matrices `[rows, columns]`, one for each of `bits`."""
    groups = columns // group_of(columns, group_size)
    widths = Counter(bits)
    codes = sum(n * packed_bytes(rows * columns, width) for width, n in widths.items())
    zeros = sum(n * packed_bytes(rows * groups, zero_width(width)) for width, n in widths.items())
    parts = {"codes": ("U8", (codes,)), "zeros": ("U8", (zeros,)), "scales": ("F16", (len(bits), rows, groups))}
    return {f"{name}.{part}": Entry(None, f"{name}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()}


def is_distilled(family: Family, name: str) -> bool:
    """Whether the tuning of the whole packed model moves this tensor, beside all scales: norms and routers."""
    return "norm" in name or name.endswith(f".{family.router_path}.{family.router_weight}")


def is_packed_part(name: str) -> bool:
    return name.endswith((".codes", ".zeros", ".scales"))


def loaded(entry: Entry, device: str) -> int:
    return 4 * entry.numel if device == "cpu" and not is_packed_part(entry.name) else entry.nbytes


def unpacked_bytes(outline: Outline, device: str) -> int:
    """Bytes of the 16-bit model's parameters, loaded."""
    entries = (entry for name, entry in outline.tensors.items() if not (name == HEAD and outline.is_tied))
    return sum(loaded(entry, device) for entry in entries)


def file_bytes(shard: dict[str, Entry]) -> int:
    """Bytes of a safetensors file of these tensors: the header's length, the header in multiples of 8, the data."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in sorted(shard.items(), key=lambda item: (ORDER.index(item[1].dtype), item[0])):
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + end


def json_bytes(value) -> int:
    return len(json.dumps(value, indent=1)) + 1


def plan_budget(allocation: dict, prediction: Prediction) -> tuple[dict[int, int], float]:
    """`({width: size of one expert}, total for all experts)`: in bytes where allocation["budget"] is set; else each size is the
    width itself, and the total the average width times the number of experts.

    allocation: as in conf/allocation/. Raises ValueError, naming the budgets that can be met, where no allocation meets this.
    """
    shape, budget = prediction.shape, allocation["budget"]
    layers, widths, keep = len(shape.moe_layers), allocation.get("widths", WIDTHS), allocation.get("keep", [])
    num_experts = layers * shape.num_experts
    if budget is None:
        sizes, total = {width: width for width in widths}, allocation["bits"] * num_experts
    else:
        widest = max(widths)
        sizes = {width: expert_bytes(shape, width, prediction.group_size) for width in widths}
        outside = prediction.folder_bytes([[widest] * shape.num_experts] * layers) - num_experts * sizes[widest]
        total = parse_bytes(budget) - outside
    low, high = (bound * layers for bound in feasible_range(shape.num_experts, list(sizes), list(sizes.values()), keep))
    if budget is not None and total < low:
        narrowest = f"every expert at {min(widths)} bit" if not keep else f"allocation.widths={widths}, allocation.keep={keep}"
        unit = " bytes" if str(budget).strip().isdigit() else ""
        raise ValueError(
            f"allocation.budget={budget}{unit}: no allocation fits; this model takes from {readable(low + outside, math.ceil)} "
            f"({narrowest}) to {readable(high + outside, math.floor)}"
        )
    if budget is None and not low - 1e-9 <= total <= high + 1e-9:
        kept = f" with allocation.keep={keep}" if keep else ""
        raise ValueError(
            f"allocation.bits={allocation['bits']:g}: no allocation meets it{kept}; averages from {low / num_experts:g} to "
            f"{high / num_experts:g} can be met"
        )
    return sizes, total
