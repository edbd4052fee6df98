"""A model folder's files: hashes, the index, the tensors that the safetensors' headers tell of. Imports no torch."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor: the file that holds it and its name there, its dtype in safetensors' words (`BF16`) and its shape.

    scale: that of its scales, where it is stored in 8 or 4 bits and read as 16-bit; dtype and shape are then what is read.
    """

    path: Path | None
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: "Entry | None" = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


def record(path: Path) -> dict:
    """`{bytes, sha256}` of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Let a file's bytes, or a folder's names, reach the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_header(path: Path) -> dict[str, dict]:
    """A safetensors file's tensors, name -> `{dtype, shape, data_offsets}`, without reading them.

    Raises ValueError naming a file whose size is not what its header says.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= path.stat().st_size else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a whole safetensors file (its header cannot be read); fetch it again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(f"{path}: not a whole safetensors file (its header says nonsense of {name}); fetch it again")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != path.stat().st_size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, its header says {8 + length + end}; fetch it again")
    return header


def _is_entry(entry) -> bool:
    """Whether a header's entry has a dtype, a shape and the place of as many bytes as these take."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(place, list) and len(place) == 2):
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *place)):
        return False
    return entry["dtype"] not in ITEM_BYTES or place[1] - place[0] == prod(shape) * ITEM_BYTES[entry["dtype"]]


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name as the folder's index has it; None without one. No file outside the folder is named."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of safetensors files ({error!r}); fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not an index of safetensors files (its weight_map is none); fetch it again")
    for tensor, name in found.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise ValueError(f"{path}: says that {name!r} holds {tensor}, which is no safetensors file of this folder")
    return found


def with_scales(found: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of a checkpoint in float8 or mxfp4 as the 16-bit ones that they are read as; see `models/lowbit.py`."""
    read = {}
    for name, entry in found.items():
        scale = found.get(f"{name}_scale_inv")
        if name.endswith("_blocks") and (scale := found.get(name.removesuffix("_blocks") + "_scales")):
            *outer, groups, half = entry.shape
            read[name.removesuffix("_blocks")] = replace(entry, dtype="BF16", shape=(*outer, 2 * groups * half), scale=scale)
        elif scale:
            read[name] = replace(entry, dtype="BF16", scale=scale)
        elif not (name.endswith("_scale_inv") or f"{name.removesuffix('_scales')}_blocks" in found):
            read[name] = entry
    return read


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder by its name on disk.

    Raises ValueError naming a shard that is missing or not whole, or a tensor that is not where the index has it.
    """
    index = read_index(folder)
    files = sorted({folder / name for name in index.values()}) if index is not None else sorted(folder.glob("*.safetensors"))
    found: dict[str, Entry] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{folder}: the index names {path.name}, which is not there; fetch it again")
        for name, entry in read_header(path).items():
            if entry["dtype"] not in ITEM_BYTES:
                raise ValueError(f"{path}: the tensor {name} is stored as {entry['dtype']}, which is not handled")
            if index is None or index.get(name) == path.name:
                found[name] = Entry(path, name, entry["dtype"], tuple(entry["shape"]))
    for name, file in (index or {}).items():
        if name not in found:
            raise ValueError(f"{folder / INDEX}: says that {file} holds {name}, but it does not; fetch the index again")
    return found
