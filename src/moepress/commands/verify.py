"""moepress verify: every artefact against the sizes and hashes of its provenance; --delete removes what is damaged."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml
from tqdm import tqdm

from moepress import integrity, locks, lookup
from moepress.commands.clean import remove
from moepress.integrity import Damage


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress verify",
        description="Compare every file of the results with its size and hash, and name what is damaged. Exit code 1 where "
        "something is.",
        epilog="A stage checks in the same way what it is about to read.",
    )
    parser.add_argument("what", nargs="*", metavar="KEY", help="only these artefacts: folder, id or key (default: all)")
    parser.add_argument("--delete", action="store_true", help="remove what is damaged and all that was made from it")
    parser.add_argument(
        "--only-damaged",
        action="store_true",
        help="with --delete: keep what was made from it; sound, where it was made before the damage",
    )
    lookup.add_results(parser)
    given = parser.parse_args(arguments)
    results = given.results
    found = [chosen(name, results) for name in given.what] or lookup.folders(results)
    found_damages = damages(found)
    for damage in found_damages:
        print(damage)
    outside = [damage for damage in found_damages if damage.outside]
    for damage in outside[:1]:
        print(f"{damage.path} lies outside of the results: {integrity.way_out(damage, results)}")
    damaged = list(dict.fromkeys(damage.folder for damage in found_damages if not damage.outside))
    made = [] if given.only_damaged else made_from(damaged, results)
    if not found_damages:
        print(f"{len(found)} artefacts, every file as it was left")
        return
    print(f"{len(damaged)} of {len(found)} artefacts are damaged{':' if damaged else ''}")
    print("".join(f"  {folder}\n" for folder in damaged), end="")
    if made:
        print("made from these:")
        print("".join(f"  {folder}\n" for folder in made), end="")
    if damaged and not given.delete:
        print(
            "--delete removes them, and the run that needs them makes them again; with --only-damaged what was made from them "
            "stays, and a run whose report is whole makes them again only where it is asked for a copy (out=, compress)"
        )
    if not given.delete or not all([removed(folder, results) for folder in [*made, *damaged]]) or outside:
        sys.exit(1)


def chosen(name: str, results: Path) -> Path:
    """The folder of an artefact of these results: what was made from it, and what is removed with it, is looked for there."""
    found = lookup.artefact(name, results)
    if found.results.resolve() != results.resolve():
        raise ValueError(f"{name}: none of {results}; give --results={found.results}, whose artefact it is")
    return found.path


def damages(found: list[Path]) -> list[Damage]:
    """The damages of these folders, found under a progress bar where there is a terminal."""
    total = sum(lookup.size_of(folder) for folder in found)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return list(integrity.damages([(folder, True) for folder in found], bar))


def made_from(damaged: list[Path], results: Path) -> list[Path]:
    """What was made from these, directly or not, as far as it can be read."""
    reached = {f"{folder.parent.name}/{folder.name}" for folder in damaged}
    inputs: dict[str, set[str]] = {}
    for item in lookup.artefacts(results):
        try:
            inputs[item.folder] = {found.folder for found in item.inputs.values()}
        except (ValueError, OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # it is damaged itself
    found: list[str] = []
    while more := [name for name, needs in inputs.items() if name not in reached and needs & reached]:
        found += more
        reached |= set(more)
    return [results / name for name in found]


def removed(folder: Path, results: Path) -> bool:
    """Remove an artefact that no stage is making or reading; whether it is gone."""
    with ExitStack() as held:
        try:
            held.enter_context(locks.hold(locks.of(folder)))
        except locks.Held as owner:
            print(f"{folder}: not removed, {owner} uses it")
            return False
        if folder.is_symlink():
            print(f"{folder}: not removed, it is a link to {folder.resolve()}")
            return False
        remove(folder, results)
        print(f"{folder}: removed")
    return True
