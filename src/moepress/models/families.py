"""The only file that knows architectures: what a model's config.json means and where its weights lie on disk.

Imports no torch, so that a configuration can be checked before anything heavy starts.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """How transformers names and stores one architecture.

    moe, router, experts: paths inside a decoder layer. attention: the module whose linears are quantized.
    disk_moe: the MoE block's path on disk. gate, up, down: an expert's matrices on disk.
    num_experts, intermediate_size: their keys in config.json.
    """

    moe: str
    router: str
    experts: str
    attention: str
    disk_moe: str
    gate: str
    up: str
    down: str
    num_experts: str
    intermediate_size: str


FAMILIES = {
    "mixtral": Family(
        moe="mlp",
        router="mlp.gate",
        experts="mlp.experts",
        attention="self_attn",
        disk_moe="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
    ),
}


@dataclass(frozen=True)
class Shape:
    """What allocation, size prediction and checks need to know of a model."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


def shape_of(config: dict, key: str) -> Shape:
    """The shape in a model's config.json; ValueError for what is not handled, naming `key` and the model type."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{key}: model type {model_type!r} is not a Mixture-of-Experts family that is handled ({known})")
    family = FAMILIES[model_type]
    names = ("num_hidden_layers", "hidden_size", family.intermediate_size, family.num_experts, "num_experts_per_tok")
    missing = [name for name in names if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"{key}: config.json lacks {', '.join(missing)}, which a {model_type} model must give")
    return Shape(model_type, *(config[name] for name in names))


def read_shape(folder: Path, key: str) -> Shape:
    """The shape of a model folder; ValueError for a folder that is missing, not a model, or holds only pickles."""
    if not folder.is_dir():
        raise ValueError(f"{key}={str(folder)!r}: no such folder; give one with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}={str(folder)!r}: no config.json in it, so it is not a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"{key}={str(folder)!r}: already quantized (quant_method {method!r}); give the 16-bit model")
    shape = shape_of(config, key)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        held = f"only pickles ({', '.join(pickles[:3])}), which are never loaded" if pickles else "no weights"
        raise ValueError(f"{key}={str(folder)!r}: holds {held}; give the model's *.safetensors files")
    return shape


def check_group_size(shape: Shape, group_size: int) -> None:
    for name, width in (("hidden_size", shape.hidden_size), ("intermediate_size", shape.intermediate_size)):
        if width % group_size:
            fits = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if not (shape.hidden_size % g or shape.intermediate_size % g)]
            raise ValueError(
                f"quantization.group_size={group_size} does not divide the model's {name}={width}; take one of {fits}"
            )


def fingerprint(folder: Path) -> str:
    """A hash that tells one model folder from another in a moment: config, tokenizer and index files whole; of each weight
    file its size, its safetensors header and 64 spread samples of 4 KiB. (The model stage hashes everything.)"""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt") and path.is_file():
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


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def is_expert_matrix(family: Family, name: str) -> bool:
    """Whether an on-disk name is one of a routed expert's matrices."""
    return f".{family.disk_moe}.experts." in name


def is_attention_linear(family: Family, name: str, size: list[int]) -> bool:
    return f".{family.attention}." in name and name.endswith(".weight") and len(size) == 2


def module_tensors(shape: Shape, layer: int, on_disk: dict) -> dict:
    """One layer's tensors under the names of the transformers module, experts fused to 3-D.

    on_disk: name -> tensor with the layer's prefix. Returns `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` beside
    the rest. Raises ValueError naming a tensor that is missing or left over.
    """
    import torch

    family = FAMILIES[shape.family]
    prefix = layer_prefix(layer)
    rest = {name.removeprefix(prefix): tensor for name, tensor in on_disk.items()}

    def take(expert: int, matrix: str):
        name = f"{family.disk_moe}.experts.{expert}.{matrix}.weight"
        if name not in rest:
            raise ValueError(f"the checkpoint lacks the tensor {prefix}{name}")
        return rest.pop(name)

    I, H = shape.intermediate_size, shape.hidden_size
    gate_up = take_first = None
    for expert in range(shape.num_experts):
        gate, up, down = take(expert, family.gate), take(expert, family.up), take(expert, family.down)
        if take_first is None:
            take_first = gate
            gate_up = torch.empty(shape.num_experts, 2 * I, H, dtype=gate.dtype)
            down_proj = torch.empty(shape.num_experts, H, I, dtype=gate.dtype)
        gate_up[expert, :I], gate_up[expert, I:], down_proj[expert] = gate, up, down
    tensors = {f"{family.experts}.gate_up_proj": gate_up, f"{family.experts}.down_proj": down_proj}
    for name, tensor in rest.items():
        tensors[re.sub(rf"^{family.disk_moe}\.", f"{family.moe}.", name)] = tensor
    return tensors


def locate(folder: Path) -> Path:
    """The model folder that a folder of results stands for: itself, or the one its `reference.json` names."""
    reference = folder / "reference.json"
    return Path(json.loads(reference.read_text())["path"]) if reference.is_file() else folder
