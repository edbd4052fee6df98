"""moepress sync: what tracking=offline mirrored here, sent to W&B by its own `wandb sync`, producers before consumers."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from moepress import lookup
from moepress.artefacts import read_json
from moepress.tracking import mirror


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress sync",
        description="Send the runs that tracking=offline mirrored into the results folder to W&B.",
        epilog="It calls `wandb sync` on the runs of one stage after the other: W&B takes the run that an artifact comes from "
        "first for the one that made it. What was sent already is left out.",
    )
    lookup.add_results(parser)
    parser.add_argument("--dry-run", action="store_true", help="only list the runs, in their order")
    given = parser.parse_args(arguments)
    generations = waiting(given.results)
    if not generations:
        print(f"{given.results}: no run waits to be sent")
        return
    if given.dry_run:
        print("\n".join(str(path) for paths in generations for path in paths))
        return
    # W&B as talkative as the user has it; its own log beside the runs, not in the working folder.
    environment = {**os.environ, "WANDB_DIR": str(given.results)}
    mirror.check_online()
    for paths in generations:
        done = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, paths)], env=environment, check=False)
        if done.returncode:
            raise ValueError(f"`wandb sync` failed with exit code {done.returncode}; the same command sends what is left")


def waiting(results: Path) -> list[list[Path]]:
    """Folders of the runs that were mirrored offline and not sent: a list for each generation, each run after those whose
    artifacts it uses."""
    found: dict[int, list[Path]] = {}
    for note in sorted((results / "tracking" / "offline" / "runs").glob("*.json")):
        told = read_json(note)
        folder = results / "wandb" / told["folder"]
        if folder.is_dir() and not list(folder.glob("*.wandb.synced")):
            found.setdefault(told["generation"], []).append(folder)
    return [found[generation] for generation in sorted(found)]
