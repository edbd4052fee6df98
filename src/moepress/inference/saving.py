"""Writing packed folders: a shard with its hash, and `save_pretrained` of a model that was loaded from one."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moepress.inference import manifest
from moepress.models import streaming
from moepress.models.files import sync

DTYPES = streaming.DTYPES | {
    "F64": torch.float64,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that a packed folder can hold."""


def write_shard(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write one shard through a rename and enter its size and hash into the folder's index.

    The index says it first: a kill between the two leaves a shard that is known to be wrong.
    """
    path = folder / name
    beside = path.with_suffix(".new")
    save_file({tensor: t.detach().contiguous().cpu() for tensor, t in tensors.items()}, beside, {"format": "pt"})
    beside.chmod(folder.stat().st_mode & 0o666)  # safetensors lets its owner alone read it
    sync(beside)
    manifest.add_shard(folder, name, beside)
    beside.replace(path)


def save_pretrained(model, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **_) -> None:
    """transformers' `save_pretrained` for a packed model: the shards of the folder it was loaded from, byte for byte.

    Tensors get back the dtypes they were stored in, whatever dtype the model computes in: exact for float32 and for the
    checkpoint's own. The shards are the checkpoint's, so `max_shard_size` has no meaning here. The tokenizer is not the
    model's to save. Raises ValueError for a model whose tensors are not those of the checkpoint any more.
    """
    if push_to_hub:
        raise ValueError("push_to_hub=True: save without it, then model.push_to_hub(repo_id) or `hf upload`")
    if not is_main_process:
        return
    layout, folder = model.hf_quantizer.layout, Path(save_directory)
    tensors = model.state_dict() if state_dict is None else state_dict
    stored = {name for shard in layout.values() for name in shard}
    added = tensors.keys() - stored - model.all_tied_weights_keys.keys()
    if changed := sorted(added | (stored - tensors.keys())):
        raise ValueError(f"the model is not the checkpoint's any more: {changed[0]} was added or removed; save what was loaded")
    if away := sorted(name for name in stored if tensors[name].is_meta):
        raise ValueError(f"{away[0]} is offloaded; load the model onto one device to save it")
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(model, folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / manifest.INDEX).unlink(missing_ok=True)
    for name, dtypes in layout.items():
        write_shard(folder, name, {tensor: tensors[tensor].to(dtype) for tensor, dtype in dtypes.items()})
    manifest.seal(folder)
    manifest.check(folder, verify=False)


def _write_config(model, folder: Path) -> None:
    """The model's configuration with the checkpoint's dtype instead of the computation's, and its guard."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.hf_quantizer.stored_dtype
    config.quantization_config = model.hf_quantizer.quantization_config
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(manifest.read_json(path) | manifest.GUARD, indent=2) + "\n")
