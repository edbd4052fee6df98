"""Keeps a report's numbers in git: `python benchmarks/reference.py REPORT_FOLDER --command "moepress study=..."`.

Writes `results/reference/<name>/`: the summary with the command, commit, device and versions that made it, `runs.csv`, the
data of every figure and the pictures of two. The keys in `runs.csv` are those of the checkout that computed them.
"""

import argparse
import json
import shutil
from pathlib import Path

PICTURES = ("quality", "differences")


def header(provenance: dict, command: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items() if name != "moepress")
    return (
        f"`{command}`, finished {provenance['start'][:10]} at commit {provenance['git_commit']} on {provenance['device']}, "
        f"{provenance['machine']['cores']} cores; {versions}."
    )


def keep(report: Path, command: str, name: str | None, to: Path) -> Path:
    provenance = json.loads((report / "provenance.json").read_text())
    folder = to / (name or report.name.rsplit("-", 1)[0])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    title, _, rest = (report / "summary.md").read_text().partition("\n")
    pictures = [figure for figure in PICTURES if (report / "figures" / f"{figure}.png").exists()]
    shown = "".join(f"![{figure}]({figure}.png)\n" for figure in pictures)
    (folder / "README.md").write_text(f"{title}\n\n{header(provenance, command)}\n{rest}\n{shown}")
    shutil.copy(report / "runs.csv", folder)
    for data in sorted((report / "figures").glob("*.csv")):
        shutil.copy(data, folder)
    for figure in pictures:
        shutil.copy(report / "figures" / f"{figure}.png", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="results/report/<study>-<key>")
    parser.add_argument("--command", required=True, help="what made it, as it was typed")
    parser.add_argument("--name", help="folder name under --to (default: the study's)")
    parser.add_argument("--to", type=Path, default=Path("results/reference"))
    arguments = parser.parse_args()
    print(keep(arguments.report, arguments.command, arguments.name, arguments.to))


if __name__ == "__main__":
    main()
