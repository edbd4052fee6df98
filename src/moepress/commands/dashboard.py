"""moepress dashboard [STUDY]: the W&B workspace that shows a study, or all of a project's."""

import argparse
import json
import sys

from moepress import lookup
from moepress.artefacts import read_json, write_json
from moepress.config import values
from moepress.tracking import mirror, records


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "moepress dashboard",
        description="Create the W&B workspace of a study, or update the one that this command created before: perplexity "
        "against size, selection shift by layer, bits of every expert, speed, and the table.",
        epilog="It shows what is at W&B: mirror first, with tracking=online, or tracking=offline and `moepress sync`. Needs "
        "network and `wandb login`; without them it says so and changes nothing.",
    )
    parser.add_argument("study", nargs="?", metavar="STUDY", help="a study's name, or a report's id or label (default: all)")
    parser.add_argument("--project", help="tracking.project (default: moepress)")
    parser.add_argument("--entity", help="tracking.entity: a team or user (default: that of `wandb login`)")
    parser.add_argument("--print", action="store_true", help="print the workspace as JSON; no network is needed")
    lookup.add_results(parser)
    given = parser.parse_args(arguments)
    tracking = values()["tracking"]
    project, entity = given.project or tracking["project"], given.entity or tracking["entity"]
    group = group_of(given.study, given.results)
    from moepress.tracking import workspace  # imports W&B's, which takes long

    if given.print:
        print(json.dumps(workspace.specification(workspace.build(entity or "", project, group)), indent=1))
        return
    mirror.check_online()
    note = given.results / "tracking" / "dashboards.json"
    known = read_json(note) if note.is_file() else {}
    place = f"{entity or ''}/{project}/{group or ''}"
    url = workspace.save(entity, project, group, known.get(place))
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, known | {place: url})
    print(f"{'updated' if known.get(place) == url else 'created'}:", file=sys.stderr)
    print(url)


def group_of(study: str | None, results) -> str | None:
    """The W&B group that a study's runs are in. A name that no report here has is taken as it is: the runs may come from
    another machine."""
    if study is None:
        return None
    try:
        return records.group_of(lookup.report(study, results))
    except ValueError:
        return study
