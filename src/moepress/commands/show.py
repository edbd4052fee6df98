"""moepress show KEY: where an artefact came from, and what it cost altogether."""

import argparse
from collections.abc import Iterator

import yaml

from moepress import lookup
from moepress.lookup import StoredArtefact
from moepress.wording import aligned, duration, readable


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress show", description="Where an artefact came from, its configuration, and what it cost with all that it needs."
    )
    parser.add_argument(
        "key",
        metavar="KEY",
        help="its key or the beginning of it, its id, its folder, or a run's name in a report: that run's evaluation",
    )
    lookup.add_results(parser)
    given = parser.parse_args(arguments)
    print("\n".join(lines(lookup.artefact(given.key, given.results))))


def lines(found: StoredArtefact) -> Iterator[str]:
    made = found.provenance
    yield str(found.path)
    rows = [
        ("made", f"from {made['start']} on, in {duration(made['seconds'])} (since its last start, if it was stopped)"),
        ("command", " ".join(made["command"])),
        ("commit", made["git_commit"] or "unknown: outside a checkout"),
        ("machine", f"{made['device']}, {made['machine']['cores']} cores, {made['machine']['system']}"),
        ("memory", f"{readable(made['peak_memory_bytes'])} at the most"),
        ("size", f"{readable(found.num_bytes)} in {len(made['files'])} files"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
    ]
    yield from (f"  {name:9} {text}" for name, text in rows)
    yield from ("", "configuration")
    config = found.described["config"]
    if found.stage == "report":  # one entry a run, each with its artefacts: the tree has them
        config = {**config, "runs": [run["run"] for run in config["runs"]]}
    text = yaml.safe_dump(config, sort_keys=True, allow_unicode=True, default_flow_style=None, width=120)
    yield from (f"  {line}" for line in text.splitlines())
    yield from ("", "made from")
    yield from (f"  {line}" for line in aligned(list(tree(found))))
    everything = [item for item in found.upstream().values() if item.exists]
    seconds, memory = (f([i.provenance[n] for i in everything]) for f, n in ((sum, "seconds"), (max, "peak_memory_bytes")))
    disk = sum(item.num_bytes for item in everything)
    cost = f"{duration(seconds)}, {readable(memory)} of memory at the most, {readable(disk)} of disk"
    yield from ("", f"altogether {cost}: {len(everything)} artefacts")


def tree(item: StoredArtefact, role: str = "", before: str = "", told: set[str] | None = None) -> Iterator[tuple[str, ...]]:
    """A row for an artefact and, indented, for each of its inputs; what was told already is named only."""
    told = set() if told is None else told
    name = f"{before}{role}{': ' if role else ''}{item.folder}"
    if not item.exists:
        yield name, "not there any more", "", ""
        return
    if item.folder in told:
        yield name, "(above)", "", ""
        return
    told.add(item.folder)
    made = item.provenance
    yield name, duration(made["seconds"]), readable(made["peak_memory_bytes"]), readable(item.num_bytes)
    for name, found in sorted(item.inputs.items()):
        role = "" if found.folder.startswith(f"{name}/") or item.stage == "report" else name
        yield from tree(found, role, f"{before}  ", told)
