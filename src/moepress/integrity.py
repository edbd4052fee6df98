"""Whether a folder of results still is what its stage left: every file's size and sha256 against provenance.json.

    moepress verify                                      # all of results/

A stage checks in the same way what it is about to read. Of a checkpoint's weights it compares only the sizes where it reads but
their headers; where the model lies outside of the results, the hashes are those of `reference.json`. Imports no torch.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from moepress.models.files import record

PROVENANCE = "provenance.json"
REFERENCE = "reference.json"
SEAL = "sha256"
ID = re.compile(r"(?P<label>.+)-(?P<key>[0-9a-f]{12})")
WEIGHTS = (".safetensors",)
DECISIVE = (*WEIGHTS, ".json", ".model", ".txt", ".jinja")
"""Files of a model folder outside of the results that decide what the model does; its README may change."""
QUIET_BYTES = 2**30
"""Up to so much is checked without a progress bar."""
THREADS = 4


@dataclass(frozen=True)
class Damage:
    """path: the file. what: what is wrong with it. folder: the artefact it belongs to. outside: not in it."""

    path: Path
    what: str
    folder: Path
    outside: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Listed:
    """A file to be hashed: its size, the sha256 on record, and the artefact it belongs to; outside: not in its folder."""

    path: Path
    folder: Path
    sha256: str
    bytes: int
    outside: bool = False


def sealed(provenance: dict) -> dict:
    """The provenance with a hash over itself as its last entry."""
    return {**provenance, SEAL: _seal(provenance)}


def _seal(provenance: dict) -> str:
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a stage finished the folder. Whether its files were damaged since is what `check` tells."""
    return (folder / PROVENANCE).is_file()


def check(folders: Iterable[tuple[Path, bool]], results: Path) -> None:
    """Raise ValueError naming the first file that is not as it was left, and the way out.

    folders: each with whether its weights are read, and so are to be hashed.
    """
    for damage in damages(folders):
        raise ValueError(f"{damage}; {way_out(damage, results)}")


def way_out(damage: Damage, results: Path) -> str:
    """What to do about it: the second half of an error."""
    if damage.outside:
        return (
            f"put back the file that was there when {damage.folder} was made; if the model was moved, remove that folder, "
            "which only says where it was; or give the model as it is now as another run"
        )
    where = "" if results == Path("results") else f" --results={results}"
    return (
        f"`moepress verify{where}` shows all that is damaged, with --delete it removes it, and the same run computes it again"
    )


def damages(folders: Iterable[tuple[Path, bool]], progress=None) -> Iterator[Damage]:
    """What is wrong with folders: first by names and sizes, then by hashes. folders: as `check` takes them.

    progress: a tqdm bar that is updated with the bytes hashed; without one a bar is made where there is much to hash.
    """
    listed: list[Listed] = []
    wrong: set[Path] = set()
    for folder, reads_weights in folders:
        for found in _unhashed(folder):
            if isinstance(found, Damage):
                wrong.add(found.path)
                yield found
            elif reads_weights or found.path.suffix not in WEIGHTS:
                listed.append(found)
    listed = [each for each in listed if each.path not in wrong]
    yield from _altered(listed, progress)


def _unhashed(folder: Path) -> Iterator[Damage | Listed]:
    """The damages that names and sizes show, and the files whose hashes remain to be compared."""
    provenance = _read(folder / PROVENANCE, folder)
    if isinstance(provenance, Damage):
        yield provenance
        return
    named = ID.fullmatch(folder.name)
    if named and (provenance["stage"], provenance["key"]) != (folder.parent.name, named["key"]):
        yield Damage(folder / PROVENANCE, f"of another artefact, {provenance['stage']} {provenance['key']}", folder)
        return
    files = {name: entry for name, entry in provenance["files"].items() if name != PROVENANCE}
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            yield Damage(path, "missing", folder)
        elif (size := path.stat().st_size) != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "altered"
            yield Damage(path, f"{what}, {size} bytes instead of {entry['bytes']}", folder)
        else:
            yield Listed(path, folder, entry["sha256"], entry["bytes"])
    for path in sorted(folder.rglob("*")):
        if path.suffix in WEIGHTS and str(path.relative_to(folder)) not in files:
            yield Damage(path, "no part of this artefact: unexpected weights", folder)
    if REFERENCE in files:
        yield from _referenced(folder)


def _referenced(folder: Path) -> Iterator[Damage | Listed]:
    """The files of the model that a folder only refers to."""
    try:
        reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
        model, hashes = Path(reference["path"]), dict(reference["files"])
    except (ValueError, OSError, KeyError, TypeError):
        return  # its own hash tells of it
    for name, sha256 in hashes.items():
        path = model / name
        if path.suffix not in DECISIVE:
            continue
        if path.is_file():
            yield Listed(path, folder, sha256, path.stat().st_size, outside=True)
        else:
            yield Damage(path, "missing", folder, outside=True)


def _read(path: Path, folder: Path) -> dict | Damage:
    """provenance.json, or what is wrong with it."""
    try:
        found = json.loads(path.read_bytes())
        files, seal = found["files"], found.pop(SEAL, None)
        told = isinstance(found["key"], str) and isinstance(found["stage"], str)
        told &= all(isinstance(e["bytes"], int) and isinstance(e["sha256"], str) for e in files.values())
    except FileNotFoundError:
        return Damage(path, "missing", folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Damage(path, f"truncated or altered, it cannot be read ({error})", folder)
    if not told or seal != _seal(found):
        return Damage(path, "altered, its sha256 is not its own", folder)
    return found


def _altered(listed: list[Listed], progress) -> Iterator[Damage]:
    """Files whose sha256 is another."""
    total = sum(each.bytes for each in listed)
    if progress is None and total > QUIET_BYTES:
        progress = tqdm(total=total, desc="checking hashes", unit="B", unit_scale=True)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        for each, found in zip(listed, pool.map(_hash, listed), strict=True):
            if progress is not None:
                progress.update(each.bytes)
            if found != each.sha256:
                where = REFERENCE if each.outside else PROVENANCE
                what = (
                    f"cannot be read ({found})" if isinstance(found, OSError) else f"altered, its sha256 is not that of {where}"
                )
                yield Damage(each.path, what, each.folder, each.outside)


def _hash(each: Listed) -> str | OSError:
    try:
        return record(each.path)["sha256"]
    except OSError as error:  # a disk that cannot be read any more
        return error
