"""Writing a packed checkpoint as a Hugging Face folder: one safetensors shard per decoder layer and one for the rest."""

import json
import shutil
from pathlib import Path

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from moepress.inference import manifest, saving
from moepress.models.streaming import ModelStream
from moepress.quantization.budget import shard_name


def write_shard(folder: Path, index: int, num_layers: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write shard `index` (a layer's; the last one holds the rest) and its hash in the folder's index."""
    saving.write_shard(folder, shard_name(index, num_layers), tensors)


def finish(folder: Path, stream: ModelStream, group_size: int, modules: dict) -> None:
    """Add the 16-bit rest, the configuration with every module's bits, the tokenizer, and the hashes of them all."""
    num_layers = stream.shape.num_layers
    write_shard(folder, num_layers, num_layers, outside_layers(stream))
    config = manifest.packed_config(stream.source_config, group_size, modules)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in manifest.BESIDE:
        if name != "config.json" and (stream.folder / name).is_file():
            shutil.copyfile(stream.folder / name, folder / name)
    manifest.seal(folder)


def outside_layers(stream: ModelStream) -> dict[str, torch.Tensor]:
    """Embedding, last norm and head under the names of transformers' modules, as packed folders have them.

    A tensor that the model ties to an equal one is left to that one; those that the model has not are named and left out.
    """
    model = stream.skeleton
    expected = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    tensors, left_out = {}, []
    for name, tensor in stream.read_dense(stream.names_outside_layers()).items():
        renamed = rename_source_key(name, renamings, [], model.base_model_prefix, expected)[0]
        known = next((found for found in (renamed, name) if found in expected), None)
        if known:
            tensors[known] = tensor
        else:
            left_out.append(name)
    for tied, kept in model.all_tied_weights_keys.items():
        if tied in tensors and kept in tensors and torch.equal(tensors[tied], tensors[kept]):
            del tensors[tied]
    if left_out:
        print(f"tensors that {type(model).__name__} has no place for are not in the checkpoint: {', '.join(left_out)}")
    return tensors


def size_on_disk(folder: Path, weights: int) -> dict:
    """Bytes of the weight files and bits per weight of the model, everything in them counted."""
    total = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    return {"checkpoint_bytes": total, "bits_effective": 8 * total / weights}


def folder_bytes(folder: Path) -> int:
    """Bytes of everything in the folder but what tells of one run's time and place (timing.json, config.yaml,
    provenance.json: some KiB), so that they are the same after a kill."""
    left_out = ("layers.json", "timing.json", "size.json", "config.yaml", "provenance.json")
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name not in left_out)
