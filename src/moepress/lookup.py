"""Artefacts and reports by the names that people give them: a folder, its id `<label>-<key>`, the beginning of its key, or the
name of a run in a report."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moepress.dag import STAGES
from moepress.integrity import ID, PROVENANCE, Damage, is_whole, way_out
from moepress.schema.values import nearest

FOLDERS = (*STAGES, "report")


@dataclass(frozen=True)
class StoredArtefact:
    """An artefact among the results, as its folder tells of it; what is yet to be made is a `dag.Artefact`."""

    results: Path
    folder: str

    @property
    def path(self) -> Path:
        return self.results / self.folder

    @property
    def stage(self) -> str:
        return self.folder.split("/")[0]

    @property
    def label(self) -> str:
        return self.path.name.rpartition("-")[0]

    @property
    def key(self) -> str:
        return self.path.name.rpartition("-")[2]

    @cached_property
    def described(self) -> dict:
        """config.yaml: stage, key, config, inputs. ValueError where it is damaged."""
        return self._read("config.yaml", yaml.safe_load, {"config", "inputs"})

    @cached_property
    def provenance(self) -> dict:
        """ValueError where it is damaged."""
        return self._read(PROVENANCE, json.loads, {"seconds"})

    def _read(self, name: str, parse: Callable[[str], Any], needs: set[str]) -> dict:
        why = "truncated or altered"
        try:
            found = parse((self.path / name).read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.keys() >= needs:
                return found
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = str(error).partition("\n")[0]
        damage = Damage(self.path / name, f"cannot be read ({why})", self.path)
        raise ValueError(f"{damage}; {way_out(damage, self.results)}")

    @property
    def inputs(self) -> dict[str, "StoredArtefact"]:
        """By role; those that were deleted too."""
        return {role: StoredArtefact(self.results, folder) for role, folder in self.described["inputs"].items()}

    @property
    def exists(self) -> bool:
        return is_whole(self.path)

    @property
    def num_bytes(self) -> int:
        return size_of(self.path)

    def upstream(self, known: dict[str, "StoredArtefact"] | None = None) -> dict[str, "StoredArtefact"]:
        """Folder -> artefact, for this one and all that it was made from, added to those already known."""
        found = {} if known is None else known
        if self.folder not in found:
            found[self.folder] = self
            if self.exists:
                for item in self.inputs.values():
                    item.upstream(found)
        return found


def size_of(folder: Path) -> int:
    """Bytes of its files, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="paths.results (default: results)")


def artefacts(results: Path) -> list[StoredArtefact]:
    """All whole artefacts."""
    return [found for path in folders(results) if (found := StoredArtefact(results, f"{path.parent.name}/{path.name}")).exists]


def folders(results: Path) -> list[Path]:
    """The folder of every artefact, those too that are not whole."""
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder; run an experiment first, or give --results=DIR")
    paths = [path for stage in FOLDERS for path in sorted((results / stage).glob("*"))]
    return [path for path in paths if ID.fullmatch(path.name) and path.is_dir()]


def artefact(name: str, results: Path) -> StoredArtefact:
    """The artefact with that folder, id or beginning of a key; for a run's name, its evaluation, which is made from all the
    others.

    Raises ValueError where there is none, or several."""
    path = Path(name)
    if path.is_dir() and ID.fullmatch(path.resolve().name):
        path = path.resolve()
        found = StoredArtefact(path.parent.parent, f"{path.parent.name}/{path.name}")
        if not found.exists:
            raise ValueError(f"{name}: no whole artefact; {PROVENANCE} is not there")
        return found
    matching = [f for f in artefacts(results) if name in (f.folder, f.path.name) or (len(name) > 3 and f.key.startswith(name))]
    if not matching:
        return _evaluation(name, results)
    if len(matching) > 1:
        raise ValueError(f"{name}: several artefacts begin so: {', '.join(found.folder for found in matching)}")
    return matching[0]


def reports(results: Path) -> list[StoredArtefact]:
    """The newest first."""
    found = [item for item in artefacts(results) if item.stage == "report"]
    return sorted(found, key=lambda item: (item.provenance.get("start", ""), item.path.stat().st_mtime), reverse=True)


def named(name: str, place: StoredArtefact) -> list[dict]:
    """The runs of a report (entries of its configuration) of that name; a name without `seed=` stands for all of its seeds."""
    runs = place.described["config"]["runs"]
    exact = [run for run in runs if run["run"] == name]
    return exact or [run for run in runs if " ".join(p for p in run["run"].split(" ") if not p.startswith("seed=")) == name]


def _evaluation(name: str, results: Path) -> StoredArtefact:
    """The evaluation of the run of that name, in whichever report. Raises ValueError where there is none, or several."""
    places = reports(results)
    runs = [(run, place) for place in places for run in named(name, place)]
    folders = {run["artefacts"]["evaluation"]: (run["run"], place) for run, place in reversed(runs)}
    if not folders:
        known = sorted({run["run"] for place in places for run in place.described["config"]["runs"]})
        guess = nearest(name, known)
        raise ValueError(
            f"{name}: no artefact of {results} has this folder, id or key, and no run of a report this name{guess}; "
            f"`moepress results` shows the runs, `ls {results}/*` the folders"
        )
    if len(folders) > 1:
        listed = "; ".join(f"{folder} ({run} of {place.path})" for folder, (run, place) in folders.items())
        raise ValueError(f"{name}: several runs are called so, give one's folder: {listed}")
    return StoredArtefact(results, next(iter(folders)))


def report(name: str | None, results: Path) -> StoredArtefact:
    """The newest report with that label, or that contains the run or the artefact of that name; the report itself for its
    folder, id or key; the newest of all for None. Raises ValueError where there is none."""
    known = reports(results)
    if labelled := [place for place in known if name in (None, place.label)]:
        return labelled[0]
    if name is None:
        raise ValueError(f"{results}: no report there; run an experiment first, or give --results=DIR")
    if having := [place for place in known if named(name, place)]:
        return having[0]
    found = artefact(name, results)
    if found.stage == "report":
        return found
    for place in known:
        if any(found.folder in run["artefacts"].values() for run in place.described["config"]["runs"]):
            return place
    raise ValueError(f"{name}: an artefact of {found.stage}, no report, and in none")
