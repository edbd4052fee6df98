"""Writing a packed checkpoint as a Hugging Face folder: one safetensors shard per decoder layer and one for the rest."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from moepress.inference.checkpoint import FORMAT_VERSION
from moepress.models import families
from moepress.models.files import read_header
from moepress.models.streaming import ModelStream
from moepress.quantization.budget import COPIED, shard_name
from moepress.quantization.size import num_weights


def write_shard(folder: Path, index: int, num_layers: int, tensors: dict) -> None:
    """Write shard `index` (a layer's; the last one holds the rest) through a rename."""
    path = folder / shard_name(index, num_layers)
    beside = path.with_suffix(".new")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, beside, {"format": "pt"})
    beside.replace(path)


def finish(folder: Path, stream: ModelStream, group_size: int, modules: dict) -> None:
    """Add the 16-bit rest, the index, the configuration with every module's bits, and the tokenizer."""
    num_layers = stream.shape.num_layers
    write_shard(folder, num_layers, num_layers, stream.read(stream.names_outside_layers()))
    where, total = {}, 0
    for index in range(num_layers + 1):
        path = folder / shard_name(index, num_layers)
        header = read_header(path)
        where.update(dict.fromkeys(header, path.name))
        total += max(entry["data_offsets"][1] for entry in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = dict(families.standard_config(stream.source_config, "model"))
    config["quantization_config"] = {
        "quant_method": "moepress",
        "format_version": FORMAT_VERSION,
        "group_size": group_size,
        "modules": modules,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in COPIED:
        if (stream.folder / name).is_file():
            shutil.copyfile(stream.folder / name, folder / name)


def size_on_disk(folder: Path, weights: int) -> dict:
    """Bytes of the weight files and bits per weight of the model, everything in them counted; and bytes of all files of the
    folder so far (config.yaml and provenance.json, some KiB, come last)."""
    total = sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))
    files = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != "layers.json")
    return {"checkpoint_bytes": total, "folder_bytes": files, "bits_effective": 8 * total / weights}


def weights_of(folder: Path) -> int:
    """Number of weights of a 16-bit model folder."""
    return num_weights(families.tensors(folder))
