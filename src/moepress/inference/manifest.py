"""What a packed folder must hold, and whether it does: the index names every file with its size and hash.

The index is written along with the shards, so a quantization that was killed goes on with it. Everything here reads files
and headers only; nothing is loaded and torch is not imported.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from moepress.models.dialects import standard_config
from moepress.models.files import INDEX, read_header, record

METHOD = "moepress"
FORMAT_VERSION = 2
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BESIDE += ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "added_tokens.json")
"""Files beside the shards that decide what the model does; the index has their hashes too."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf")
QUIET_BYTES = 2**30
"""Folders up to this size are checked without a progress bar."""

GUARD = {"transformers_weights": "import moepress before this folder is loaded"}
"""An entry of config.json that stops transformers alone, which would go on with random weights: it takes it for the name of the
weights' file, says that it is none, and repeats it. The quantizer, there after `import moepress`, takes it away."""

AGAIN = "fetch or write the checkpoint again"


def packed_config(config: dict, group_size: int, modules: dict) -> dict:
    """config.json of a packed folder. config: the 16-bit model's. modules: module name -> its width, or every expert's."""
    packed = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "group_size": group_size, "modules": modules}
    return standard_config(config, "model") | GUARD | {"quantization_config": packed}


def add_shard(folder: Path, name: str, path: Path) -> None:
    """Enter the file `path`, about to become the shard `name`, into the folder's index, in place of what was said of it."""
    index = read_index(folder) if (folder / INDEX).is_file() else {"metadata": {"files": {}}, "weight_map": {}}
    where = {tensor: shard for tensor, shard in index["weight_map"].items() if shard != name}
    index["weight_map"] = where | dict.fromkeys(read_header(path), name)
    index["metadata"]["files"][name] = record(path)
    _write_index(folder, index)


def seal(folder: Path) -> None:
    """Record configuration, generation configuration and tokenizer as they are now, after a change that is meant to be."""
    folder = Path(folder)
    index = read_index(folder)
    shards = set(index["weight_map"].values())
    files = {name: entry for name, entry in index["metadata"]["files"].items() if name in shards}
    files |= {name: record(folder / name) for name in BESIDE if (folder / name).is_file()}
    tensors = [entry["data_offsets"] for shard in shards for entry in read_header(folder / shard).values()]
    index["metadata"] = {"total_size": sum(end - start for start, end in tensors), "files": files}
    _write_index(folder, index)


def _write_index(folder: Path, index: dict) -> None:
    metadata = {**index["metadata"], "files": dict(sorted(index["metadata"]["files"].items()))}
    index = {"metadata": metadata, "weight_map": dict(sorted(index["weight_map"].items()))}
    beside = folder / f".{INDEX}.new"
    beside.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / INDEX)


def read_json(path: Path) -> dict:
    """A JSON object; ValueError naming a file that is missing or holds none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}), truncated or altered; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object, so it was altered; {AGAIN}")
    return found


def read_index(folder: Path) -> dict:
    """The index of a packed folder; ValueError where it is missing, damaged or has no hashes."""
    index = read_json(folder / INDEX)
    metadata, where = index.get("metadata"), index.get("weight_map")
    files = metadata.get("files") if isinstance(metadata, dict) else None
    if not isinstance(files, dict) or not isinstance(where, dict):
        raise ValueError(f"{folder / INDEX}: has no metadata.files with sizes and hashes, so nothing can be checked; {AGAIN}")
    for name, entry in files.items():
        is_plain = Path(name).name == name
        if not is_plain or not isinstance(entry, dict) or {"bytes", "sha256"} - set(entry):
            raise ValueError(f"{folder / INDEX}: metadata.files[{name!r}] is no file name with bytes and sha256; {AGAIN}")
    return index


def is_packed(folder: Path) -> bool:
    """Whether moepress wrote a folder: by its configuration, or by its index where the configuration lost that."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == METHOD
    return (folder / INDEX).is_file() and "files" in (read_json(folder / INDEX).get("metadata") or {})


def check_version(version, where: str) -> None:
    """Raise ValueError for a format that this moepress cannot read."""
    if not isinstance(version, int):
        raise ValueError(f"{where}: quantization_config.format_version={version!r} is no version; {AGAIN}")
    if version > FORMAT_VERSION:
        raise ValueError(f"{where}: format version {version}; this moepress reads up to {FORMAT_VERSION}: update moepress")
    if version < FORMAT_VERSION:
        raise ValueError(f"{where}: format version {version} has no hashes and is no longer read; quantize the model again")


def check(folder: Path, verify: bool = True, complete: bool = True) -> dict[str, dict]:
    """Compare a packed folder with its index; return each shard's header, `{shard: {tensor: {dtype, shape, ...}}}`.

    verify: hash every file; without it only names, sizes and headers are compared.
    complete: the folder must hold tokenizer and generation configuration too (not so in the hub's cache, which has what was
    asked for). Raises ValueError naming a file that is missing, unexpected, truncated, altered or of another version.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        check_version(quantization.get("format_version"), str(folder / "config.json"))
    index = read_index(folder)
    files, shards = index["metadata"]["files"], set(index["weight_map"].values())
    if unknown := sorted(({"config.json"} | shards) - files.keys()):
        raise ValueError(f"{folder / INDEX}: has no size and hash for {unknown[0]}; {AGAIN}")
    required = files.keys() if complete else shards | {"config.json"}
    if missing := sorted(name for name in required if not (folder / name).is_file()):
        raise ValueError(f"{folder / missing[0]}: missing ({_count(missing)}); {AGAIN}")
    stray = (path for path in folder.iterdir() if path.suffix.lower() in WEIGHTS and path.name not in shards)
    if unexpected := sorted(path.name for path in stray):
        raise ValueError(
            f"{folder / unexpected[0]}: unexpected weights, no part of this checkpoint ({_count(unexpected)}); move them away"
        )
    present = {name: entry for name, entry in files.items() if (folder / name).is_file()}
    for name, entry in sorted(present.items()):
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "altered"
            raise ValueError(f"{folder / name}: {what}, {size} bytes instead of {entry['bytes']}; {_way_out(name, shards)}")
    headers = {shard: read_header(folder / shard) for shard in sorted(shards)}
    for shard, header in headers.items():
        listed = {tensor for tensor, name in index["weight_map"].items() if name == shard}
        if listed != header.keys():
            differ = sorted(listed ^ header.keys())
            raise ValueError(f"{folder / INDEX}: altered, it disagrees with {shard} about the tensor {differ[0]}; {AGAIN}")
    if verify:
        _verify(folder, present, shards)
    return headers


def _verify(folder: Path, files: dict[str, dict], shards: set[str]) -> None:
    total = sum(entry["bytes"] for entry in files.values())
    progress = tqdm(total=total, desc="checking hashes", unit="B", unit_scale=True, disable=total < QUIET_BYTES)
    with progress, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        for name, found in zip(files, pool.map(lambda name: record(folder / name), files), strict=True):
            if found["sha256"] != files[name]["sha256"]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(f"{folder / name}: altered, its sha256 is not the index's; {_way_out(name, shards)}")
            progress.update(files[name]["bytes"])


def _way_out(name: str, shards: set[str]) -> str:
    if name in shards:
        return AGAIN
    return f"{AGAIN}, or record a change of your own by moepress.inference.manifest.seal(folder)"


def _count(names: list[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"
