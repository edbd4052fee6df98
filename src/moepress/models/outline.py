"""A model as its config.json and the names and shapes of its tensors tell it: imports no torch and reads no weight.

`read` looks into a folder's headers; `from_headers` takes them from elsewhere. `from_index` makes do with config.json and the
index, where the shapes outside the experts are estimated; `from_recipe` and `from_carving` with the configuration of a model
that is yet to be trained or carved.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moepress.models import dense, families, folders
from moepress.models.dialects import standard_name
from moepress.models.families import ATTENTION, FAMILIES, Shape, layer_prefix
from moepress.models.files import INDEX, ITEM_BYTES, Entry, read_index, with_scales

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TOKENIZER_BYTES = 60
"""Of tokenizer.json, by entry of the vocabulary, where the file itself is not there."""


@dataclass(frozen=True)
class Outline:
    """config: config.json as it is. tensors: as `folders.tensors` has them. files: name -> bytes of what is no weight file.
    is_estimate: whether the shapes of the linears outside the experts are estimated."""

    config: dict
    shape: Shape
    tensors: dict[str, Entry]
    files: dict[str, int] = field(default_factory=dict)
    is_estimate: bool = False

    @cached_property
    def num_weights(self) -> int:
        return sum(entry.numel for entry in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are read: those stored in 8 or 4 bits count as 16-bit ones."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, also where the files hold both."""
        return bool(self.config.get("tie_word_embeddings")) or "lm_head.weight" not in self.tensors

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.shape.hidden_size * self.shape.intermediate_size

    @property
    def routed_weights(self) -> int:
        return len(self.shape.moe_layers) * self.shape.num_experts * self.expert_weights

    @property
    def active_weights(self) -> int:
        """Weights that a token meets: everything but the routed experts that it does not select."""
        idle = self.shape.num_experts - self.shape.top_k
        return self.num_weights - len(self.shape.moe_layers) * idle * self.expert_weights


def read(folder: Path, key: str) -> Outline:
    """The outline of a folder with its weights; ValueError as `folders.read_model` has it. key: the configuration's."""
    config, shape, tensors = folders.read_model(folder, key)
    return Outline(config, shape, tensors, other_files(folder))


def read_any(folder: Path, key: str) -> Outline:
    """The same, also of a folder with config.json and the index alone."""
    where = (read_index(folder) or {}) if folder.is_dir() else {}
    if where and not all((folder / name).is_file() for name in set(where.values())):
        return from_index(folder, key)
    return read(folder, key)


def other_files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".safetensors"}


def with_tokenizer(files: dict[str, int], shape: Shape) -> dict[str, int]:
    """The files of a folder, with one for the tokenizer where none is there yet."""
    is_there = {"tokenizer.json", "tokenizer.model"} & set(files)
    return files if is_there else files | {"tokenizer.json": TOKENIZER_BYTES * shape.vocab_size}


def from_headers(folder: Path, key: str, stored: dict[str, Entry]) -> Outline:
    """An outline from a folder with config.json and the tensors that lie elsewhere, by their stored names; ValueError as
    `folders.read_model` has it."""
    config = folders.read_config(folder, key)
    families.shape_of(config, key)
    if odd := [f"{name} is stored as {entry.dtype}" for name, entry in stored.items() if entry.dtype not in ITEM_BYTES]:
        raise ValueError(f"{key}: the tensor {odd[0]}, which is not handled")
    tensors = folders.standard_tensors(with_scales(stored), config)
    shape = families.shape_of(config, key, tensors)
    folders.check_experts(shape, tensors, folder)
    return Outline(config, shape, tensors, with_tokenizer(other_files(folder), shape))


def from_index(folder: Path, key: str) -> Outline:
    """An outline from config.json and the index.

    Experts, embedding, head and routers have the shapes that config.json gives; the index's total size less theirs is
    shared evenly among the other linears. Raises ValueError naming a file that does not say what is needed.
    """
    config = folders.read_config(folder, key)
    families.shape_of(config, key)
    index = json.loads((folder / INDEX).read_text())
    total = (index.get("metadata") or {}).get("total_size")
    if not isinstance(total, int):
        raise ValueError(f"{folder / INDEX}: no metadata.total_size, which sizes are told from; fetch the *.safetensors too")
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    widths = stored_widths(index["weight_map"], ITEM_BYTES[dtype])
    names = {name: standard_name(config["model_type"], name) for name in widths}
    shape = families.shape_of(config, key, names.values())
    names = {name: re.sub(r"^mtp\.layers\.", "model.layers.", standard) for name, standard in names.items()}
    known = {name: families.known_shape(shape, standard) for name, standard in names.items()}
    found = {name: Entry(None, name, dtype, size) for name, size in known.items() if size}
    left = total - sum(widths[name] * entry.numel for name, entry in found.items())
    if left < 0:
        raise ValueError(f"{folder / INDEX}: total_size={total} is less than the experts that config.json describes take")
    linears = [name for name, size in known.items() if not size]
    each = left / max(1, sum(widths[name] for name in linears))
    size = (round(each / shape.hidden_size), shape.hidden_size)
    found |= {name: Entry(None, name, dtype, size) for name in linears}
    tensors = folders.standard_tensors(found, config)
    folders.check_experts(shape, tensors, folder)
    return Outline(config, shape, tensors, with_tokenizer(other_files(folder), shape), is_estimate=True)


def stored_widths(names: Iterable[str], plain: int) -> dict[str, float]:
    """Tensor -> bytes of one of its weights on disk, scales included: names tell float8 and mxfp4 (`models/lowbit.py`)."""
    names, found = set(names), {}
    for name in sorted(names):
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem != name and {f"{stem}_blocks", f"{stem}_scales"} <= names:
            found[stem] = 17 / 32
        elif not name.endswith("_scale_inv"):
            found[name] = 1 + 4 / 128**2 if f"{name}_scale_inv" in names else plain
    return found


def from_recipe(model: dict) -> Outline:
    """The outline of the small model that a recipe (the group `model`) will train."""
    return from_config(model["architecture"] | {"vocab_size": model["tokenizer"]["vocab_size"]}, "model.architecture")


def from_carving(model: dict) -> Outline:
    """The outline of what the carving (the group `model`) will make of its dense model."""
    return from_config(dense.carved_config(dense.read_config(model), model), "model")


def from_config(config: dict, key: str) -> Outline:
    """An outline from config.json alone, of the families that models are made of here. key: the configuration's."""
    shape = families.shape_of(config, key)
    family, H, V = FAMILIES[shape.family], shape.hidden_size, shape.vocab_size
    head = config.get("head_dim") or H // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    attention = {"q": (queries, H), "k": (keys, H), "v": (keys, H), "o": (H, queries)}
    shared = config.get("shared_expert_intermediate_size")
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    if not config.get("tie_word_embeddings"):
        sizes["lm_head.weight"] = (V, H)
    for layer in range(shape.num_layers):
        prefix = layer_prefix(layer)
        sizes |= {f"{prefix}{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        sizes |= {f"{prefix}{ATTENTION}.{name}_proj.weight": size for name, size in attention.items()}
        if config.get("qkv_bias"):
            sizes |= {f"{prefix}{ATTENTION}.{name}_proj.bias": attention[name][:1] for name in "qkv"}
        if layer not in shape.moe_layers:
            at, inner = f"{prefix}{family.block}.", config["intermediate_size"]
            sizes |= {f"{at}{family.gate}.weight": (inner, H), f"{at}{family.up}.weight": (inner, H)}
            sizes[f"{at}{family.down}.weight"] = (H, inner)
            continue
        sizes[f"{prefix}{family.disk_block or family.block}.{family.router}.weight"] = (shape.num_experts, H)
        for expert in range(shape.num_experts):
            at = f"{prefix}{family.experts_on_disk}.{expert}."
            sizes |= {f"{at}{name}.weight": (shape.intermediate_size, H) for name in (family.gate, family.up)}
            sizes[f"{at}{family.down}.weight"] = (H, shape.intermediate_size)
        if shared:
            at = f"{prefix}{family.block}.shared_expert"
            sizes |= {f"{at}.{name}.weight": (shared, H) for name in (family.gate, family.up)}
            sizes |= {f"{at}.{family.down}.weight": (H, shared), f"{at}_gate.weight": (1, H)}
    tensors = {name: Entry(None, name, "BF16", size) for name, size in sizes.items()}
    return Outline(config, shape, tensors, {"tokenizer.json": TOKENIZER_BYTES * V})
