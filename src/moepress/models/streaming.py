"""Walking a model one decoder layer at a time, straight from its safetensors: the whole model is never built.

The skeleton lives on the meta device; a layer's weights are read when its turn comes and dropped after it.

Legend: N sequences, S positions, H hidden size, T = N * S tokens, E experts, K selected experts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moepress.models.families import FAMILIES, layer_prefix, module_tensors, read_shape

SEQUENCES_AT_ONCE = 8
"""Sequences in one forward of a layer: bounds the activations beside the stored streams."""


class ModelStream:
    """A model folder, read layer by layer in `dtype` on `device`; raises ValueError naming a tensor with NaN or inf."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        self.shape = read_shape(self.folder, "model.path")
        self.family = FAMILIES[self.shape.family]
        self.config = AutoConfig.from_pretrained(self.folder)
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self.skeleton.eval()
        self.files = tensor_files(self.folder)
        self.storage_dtype = torch_dtype_of(self.folder, self.files)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names on disk, as stored."""
        found = {}
        for path in sorted({self.files[name] for name in names}):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.files[name] == path:
                        found[name] = file.get_tensor(name)
                        if found[name].is_floating_point() and not found[name].isfinite().all():
                            raise ValueError(f"{path}: the tensor {name} holds NaN or infinite values; the file is damaged")
        return found

    def names_outside_layers(self) -> list[str]:
        """On-disk names of the embedding, the last norm and the head."""
        return sorted(name for name in self.files if not name.startswith("model.layers."))

    def embed(self, token_ids_NS: torch.Tensor) -> torch.Tensor:
        """Hidden states `[N, S, H]` that enter the first layer."""
        weight = self.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"].to(self.dtype)
        return nn.functional.embedding(token_ids_NS, weight).to(self.device)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Layer `index` under its module's names, experts 3-D, in the checkpoint's own dtype."""
        names = [name for name in self.files if name.startswith(layer_prefix(index))]
        return module_tensors(self.shape, index, self.read(names))

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights."""
        layer = self.skeleton.model.layers[index].to_empty(device=self.device)
        tensors = {name: t.to(self.device, self.dtype) for name, t in self.layer_tensors(index).items()}
        missing, left_over = layer.load_state_dict(tensors, strict=False, assign=True)
        if missing or left_over:
            raise ValueError(f"{self.folder}: layer {index} lacks {missing} or has unknown tensors {left_over}")
        return layer.requires_grad_(False)

    def layers(self, start: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Every layer from `start` on in turn; one is in memory at a time."""
        for index in range(start, self.shape.num_layers):
            yield index, self.layer(index)
            self.skeleton.model.layers[index] = nn.Identity()

    def positions(self, seq_len: int):
        """The rotary embedding's cos and sin for positions 0 to seq_len - 1."""
        rotary = type(self.skeleton.model.rotary_emb)(config=self.config).to(self.device)
        return rotary(torch.empty(0, dtype=self.dtype, device=self.device), torch.arange(seq_len)[None].to(self.device))

    def module(self, layer: nn.Module, name: str) -> nn.Module:
        """A part of a layer by the family's word for it: moe, router, experts or attention."""
        return layer.get_submodule(getattr(self.family, name))

    def attention_linears(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """The attention's linears under their names in the layer."""
        attention = self.module(layer, "attention")
        return {
            f"{self.family.attention}.{name}": module
            for name, module in attention.named_modules()
            if isinstance(module, nn.Linear)
        }

    def attend(self, layer: nn.Module, x_NSH: torch.Tensor, position_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer up to its MoE block: the residual stream `[N, S, H]` and the block's input `[N, S, H]`.

        The block is swapped for one that keeps its input and adds nothing, so the layer's own code does the rest.
        """
        holder, _, name = self.family.moe.rpartition(".")
        parent = layer.get_submodule(holder)
        block, tap = getattr(parent, name), _Tap()
        setattr(parent, name, tap)
        residual = torch.empty_like(x_NSH)
        block_input = torch.empty_like(x_NSH)
        try:
            for start in range(0, x_NSH.shape[0], SEQUENCES_AT_ONCE):
                part = slice(start, start + SEQUENCES_AT_ONCE)
                residual[part] = layer(x_NSH[part], position_embeddings=position_embeddings, attention_mask=None)
                block_input[part] = tap.kept
        finally:
            setattr(parent, name, block)
        return residual, block_input

    def route(self, layer: nn.Module, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The router's `(logits [T, E], weights [T, K], indices [T, K])`."""
        return self.module(layer, "router")(x_TH)


class _Tap(nn.Module):
    def forward(self, x):
        self.kept = x
        return torch.zeros_like(x)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file; ValueError for a shard that is missing or cannot be read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text())["weight_map"]
        missing = sorted({file for file in where.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder}: the index names {missing[0]}, which is not there")
        return {name: folder / file for name, file in where.items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except Exception as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return found


def torch_dtype_of(folder: Path, files: dict[str, Path]) -> torch.dtype:
    """The dtype the checkpoint's weights are stored in (that of its embedding)."""
    name = "model.embed_tokens.weight"
    if name not in files:
        raise ValueError(f"{folder}: the checkpoint lacks the tensor {name}")
    with safe_open(files[name], framework="pt") as file:
        kind = file.get_slice(name).get_dtype()
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    if kind not in known:
        raise ValueError(f"{files[name]}: {name} is stored as {kind}; known are {', '.join(known)}")
    return known[kind]


def save_state(folder: Path, next_layer: int, tensors: dict[str, torch.Tensor]) -> None:
    """Keep what a stage needs to go on from `next_layer` after a kill; whole or not at all."""
    beside = folder / "state.safetensors.new"
    save_file({name: t.contiguous() for name, t in tensors.items()}, beside, {"next_layer": str(next_layer)})
    beside.replace(folder / "state.safetensors")


def load_state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """`(next_layer, tensors)` of the last `save_state`, `(0, {})` without one."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0, {}
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["next_layer"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def drop_state(folder: Path) -> None:
    for name in ("state.safetensors", "state.safetensors.new"):
        (folder / name).unlink(missing_ok=True)
