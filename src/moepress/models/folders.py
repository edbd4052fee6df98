"""A 16-bit model's folder: its config.json and headers read and checked, its tensors by their family's names, its fingerprint.

Imports no torch, as families.py.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from moepress.models.dialects import DIALECTS, standard_config, standard_name
from moepress.models.families import (
    FAMILIES,
    Shape,
    is_expert_matrix,
    is_fused,
    layer_prefix,
    shape_of,
)
from moepress.models.files import Entry, entries, read_index, with_scales

FLOAT8 = ("e4m3", "float8_e4m3fn", None)
"""What configurations call float8 with blocks (`fmt`): DeepSeek-V3's, MiniMax-M2's; transformers' own say nothing."""


def read_config(folder: Path, key: str) -> dict:
    """config.json of a 16-bit model's folder, as it is; ValueError for what is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{key}={str(folder)!r}: no such folder; give one with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}={str(folder)!r}: no config.json in it, so it is not a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config") or {}, dict):
        raise ValueError(f"{path}: not a model's configuration; fetch it again")
    quantized = config.get("quantization_config") or {}
    method = quantized.get("quant_method")
    is_float8 = method == "fp8" and quantized.get("fmt") in FLOAT8 and quantized.get("weight_block_size", True)
    is_read = method == "mxfp4" or is_float8
    if quantized and not is_read:
        raise ValueError(f"{key}={str(folder)!r}: already quantized (quant_method {method!r}); give the 16-bit model")
    return config


def read_shape(folder: Path, key: str) -> Shape:
    """The shape of a model folder; ValueError for a folder that is missing, not a model, or holds only pickles."""
    return read_model(folder, key)[1]


def read_model(folder: Path, key: str) -> tuple[dict, Shape, dict[str, Entry]]:
    """`(config.json, shape, tensors)` of a model folder, its headers read once; ValueError as `read_shape` has it."""
    config = read_config(folder, key)
    shape_of(config, key)
    if read_index(folder) is None and not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        held = f"only pickles ({', '.join(pickles[:3])}), which are never loaded" if pickles else "no weights"
        raise ValueError(f"{key}={str(folder)!r}: holds {held}; give the model's *.safetensors files")
    found = tensors(folder, config)
    shape = shape_of(config, key, found)
    check_experts(shape, found, folder)
    return config, shape, found


def tensors(folder: Path, config: dict | None = None) -> dict[str, Entry]:
    """Every tensor of a 16-bit model folder by its family's name on disk (see `Dialect`), added ones included."""
    config = json.loads((folder / "config.json").read_text()) if config is None else config
    found = entries(folder)
    for name, entry in found.items():
        if re.match(r"model\.layers\.(?!\d+\.)", name) or re.search(r"\.experts\.(?!\d+\.)[^.]+\..*weight", name):
            raise ValueError(f"{entry.path}: holds the tensor {name}, whose layer or expert has no number; fetch it again")
    return standard_tensors(with_scales(found), config)


def standard_tensors(stored: dict[str, Entry], config: dict) -> dict[str, Entry]:
    """The same from the entries by their stored names, as `with_scales` gives them.

    Layers beyond config.json's (those for multi-token prediction) are left out, as transformers leaves them out; and what sees
    pictures.
    """
    beyond = standard_config(config, "model").get("num_hidden_layers", 0)
    named = {standard_name(config.get("model_type"), name): entry for name, entry in stored.items()}
    found = {
        name: entry
        for name, entry in named.items()
        if not (name.startswith("model.layers.") and int(name.split(".")[2]) >= beyond)
        and not name.startswith(("mtp.", "model.visual."))
    }
    if dialect := DIALECTS.get(config.get("model_type", "")):
        family = FAMILIES[dialect.family]
        for layer in sorted({int(name.split(".")[2]) for name in found if is_expert_matrix(family, name)}):
            for name, shape in dialect.zeros.items():
                dtype = found["model.embed_tokens.weight"].dtype
                found[layer_prefix(layer) + name] = Entry(None, name, dtype, shape(config))
    return found


def num_weights(folder: Path) -> int:
    """How many weights a 16-bit model folder holds."""
    return sum(entry.numel for entry in tensors(folder).values())


def check_experts(shape: Shape, found: Iterable[str], folder: Path) -> None:
    """ValueError naming a layer that holds another number of experts than config.json says (where they lie one by one)."""
    family = FAMILIES[shape.family]
    held: dict[int, set[int]] = {}
    for name in found:
        if is_expert_matrix(family, name) and not is_fused(family, name):
            parts = name.split(".")
            held.setdefault(int(parts[2]), set()).add(int(parts[parts.index("experts") + 1]))
    for layer, experts in held.items():
        if experts != set(range(shape.num_experts)):
            odd = sorted(experts ^ set(range(shape.num_experts)))
            what = f"lacks expert {odd[0]}" if odd[0] < shape.num_experts else f"has an expert {odd[0]}"
            raise ValueError(f"{folder}: layer {layer} {what}, config.json says {shape.num_experts} experts; fetch it again")


def check_positions(config: dict, key: str, seq_len: int) -> None:
    """ValueError for sequences beyond the positions that a model knows. config: config.json's."""
    most = standard_config(config, "model").get("max_position_embeddings")
    if most and seq_len > most:
        known = f"{most} positions (max_position_embeddings of config.json)"
        raise ValueError(f"{key}={seq_len}: the model has {known}; ask for shorter sequences")


def fingerprint(folder: Path) -> str:
    """A hash that tells one model folder from another in a moment: config, tokenizer, chat template and index whole; of each
    weight file its size, its safetensors header and 64 spread samples of 4 KiB. (The model stage hashes everything.)"""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja") and path.is_file():
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header, size)))
                for index in range(64):
                    file.seek(max(0, size - 4096) * index // 63)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def locate(folder: Path) -> Path:
    """The model folder that a folder of results stands for: itself, or the one its `reference.json` names."""
    reference = folder / "reference.json"
    return Path(json.loads(reference.read_text())["path"]) if reference.is_file() else folder
