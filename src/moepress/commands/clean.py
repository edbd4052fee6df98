"""moepress clean: the artefacts that nothing needs any more, with their sizes; removed after asking."""

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from moepress import dag, locks, lookup, plan, studies
from moepress.composing import ROOT
from moepress.config import values
from moepress.wording import aligned, readable


def main(arguments: list[str]) -> None:
    given = options().parse_args(arguments)
    results = Path(values(given.overrides)["paths"]["results"]).expanduser()
    needed, unknown = needed_folders(given.study, given.overrides, given.keep, results)
    for message in unknown:
        print(f"moepress: {message}", file=sys.stderr)
    if unknown and given.yes:
        raise ValueError(
            "with --yes nothing is removed while it is not known what a study needs; name those to keep by --study"
        )
    unneeded = unneeded_paths(results, needed)
    if not unneeded:
        print(f"every artefact of {results} is needed")
        return
    sizes = {path: lookup.size_of(path) for path in unneeded}
    print("\n".join(aligned([(str(path), readable(size)) for path, size in sizes.items()])))
    total = f"{len(unneeded)} artefacts, {readable(sum(sizes.values()))}"
    if given.dry_run:
        print(f"{total}: would be removed")
        return
    if not given.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"{total}: nobody to ask here; --yes removes them, --dry-run only lists them")
        if input(f"remove {total}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    remove_all(unneeded, results)
    print(f"{total}: removed")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "moepress clean",
        description="List the artefacts that neither a study of conf/study/ nor --keep needs, and remove them after asking.",
        epilog="KEY=VALUE: as the studies were run, such as `model=local model.path=...`. Nothing outside of paths.results is "
        "touched, nor its W&B runs. What is removed by mistake is computed anew by the run that needs it.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the studies, paths.results among them")
    parser.add_argument("--study", action="append", metavar="NAME", help="keep only these studies' (default: every study's)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="WHAT",
        help='keep this too: the overrides of an experiment or a sweep in quotes ("quantization=gptq,qesc seed=0,1"), or '
        "a report (its folder, id, key or label); may repeat",
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument("--dry-run", action="store_true", help="list only")
    return parser


def remove_all(unneeded: list[Path], results: Path) -> None:
    """ValueError, nothing or a part of it removed, where a process computes here or holds one of them."""
    if working := locks.working_here():
        raise ValueError(f"process {working[0]} computes here; wait for it, or end it")
    for path in unneeded:
        try:
            with locks.hold(locks.of(path)):
                remove(path, results)
        except locks.Held as owner:
            raise ValueError(f"{path}: {owner} uses it; what comes before it in the list is removed") from None


def needed_folders(names: list[str] | None, overrides: list[str], keep: list[str], results: Path) -> tuple[set[str], list[str]]:
    """Folders of all that is needed, and a message for each study of which that cannot be told."""
    needed: set[str] = set()
    unknown = []
    for name in names or sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")):
        try:
            study = studies.load_study(name)
            needed |= folders(study["name"], study["caption"], studies.study_experiments(study, overrides))
        except ValueError as error:
            if names:
                raise
            unknown.append(f"study={name} cannot be composed, so nothing is kept for it: {error}")
    for what in keep:
        if "=" in what:
            needed |= folders(*plan.joined([studies.experiment([*overrides, *member]) for member in expanded(what)]))
        else:
            needed |= lookup.report(what, results).upstream().keys()
    return needed, unknown


def folders(name: str, caption: str, members: list[studies.Experiment]) -> set[str]:
    return set(dag.everything([studies.report_artefact(name, caption, members)]))


def expanded(line: str) -> list[list[str]]:
    """The overrides of each member of a sweep, as Hydra's own sweeper has them."""
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(shlex.split(line)), None)
    return batch


def unneeded_paths(results: Path, needed: set[str]) -> list[Path]:
    """Whole artefacts and unfinished ones that are not needed, and what a removal left that was killed. Links are left alone:
    what they name may lie elsewhere."""
    found = []
    for stage in lookup.FOLDERS:
        for path in sorted((results / stage).glob("*")):
            name = path.name.removesuffix(".partial")
            inside = not path.is_symlink() and path.resolve().is_relative_to(results.resolve())
            if not path.is_dir() or not inside:
                continue
            is_unneeded = lookup.ID.fullmatch(name) and f"{stage}/{name}" not in needed
            if is_unneeded or is_half_removed(path):
                found.append(path)
    return found


def is_half_removed(path: Path) -> bool:
    """Whether `remove` was killed at it."""
    name = path.name.removesuffix(".removed")
    return name != path.name and bool(re.fullmatch(rf"\.{lookup.ID.pattern}(\.partial)?", name))


def remove(path: Path, results: Path) -> None:
    """An artefact with its task, its log and the note that it was mirrored."""
    stage, name = path.parent.name, path.name.removesuffix(".partial")
    if is_half_removed(path):
        shutil.rmtree(path)
        return
    beside = path.with_name(f".{path.name}.removed")
    if beside.exists():  # of a removal that was killed
        shutil.rmtree(beside)
    path.rename(beside)  # whole or absent, at every moment
    shutil.rmtree(beside)
    notes = [results / "logs" / stage / f"{name}.log", results / "tasks" / stage / f"{name}.yaml"]
    if stage == "report":
        notes += [*(results / "tracking").glob(f"*/{name}.json"), results / "tasks" / "asked" / f"{name}.json"]
    for note in notes:
        note.unlink(missing_ok=True)
