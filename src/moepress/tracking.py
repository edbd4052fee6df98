"""Mirror a report at W&B: one run per experiment, grouped by study. The local files are the truth.

Runs after the report, as `python -m moepress.tracking REPORT OUT.json PROJECT`; the mode is the name of OUT's folder.
A run's id is its experiment's key, so mirroring again updates it instead of adding another.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from moepress import integrity
from moepress.artefacts import read_config, write_json


def mirror(report: Path, mode: str, project: str) -> list[dict]:
    """Send every row of a report's runs.csv with its configuration and the figures; the table goes into a run of its own.

    Returns each run's id and name. Raises ValueError where W&B cannot be reached or knows no key.
    """
    import wandb

    results = report.parent.parent
    integrity.check([(report, True)], results)
    described = read_config(report)
    folders = {results / folder for run in described["runs"] for folder in run["artefacts"].values()}
    integrity.check([(folder, False) for folder in sorted(folders)], results)
    table = pd.read_csv(report / "runs.csv")
    all_keys = table.pop("keys").map(json.loads)
    rows = zip(table.to_dict("records"), all_keys, described["runs"], strict=True)
    sent = []
    for row, keys, run in tqdm(rows, total=len(table), desc="wandb", unit="run"):
        with start(wandb, results, mode, project, described["name"], run, keys) as tracked:
            tracked.summary.update({name: value for name, value in row.items() if pd.notna(value)})
            log_layers(tracked, results, run)
            tracked.log(figures(wandb, report))
            sent.append({"id": tracked.id, "name": run["run"]})
    overview = {"run": described["name"], "artefacts": {"report": f"report/{report.name}"}}
    with start(wandb, results, mode, project, described["name"], overview, {"report": report.name[-12:]}) as tracked:
        tracked.log({"runs": wandb.Table(dataframe=table), **figures(wandb, report)})
        sent.append({"id": tracked.id, "name": f"{described['name']} (table and figures)"})
    return sent


def start(wandb, results: Path, mode: str, project: str, study: str, run: dict, keys: dict):
    """A W&B run for an experiment: its configuration is what its stages read, its id their last key."""
    config = {name: run[name] for name in ("quantization", "allocation", "pruning", "seed") if name in run}
    stages = {stage: read_config(results / folder) for stage, folder in run["artefacts"].items() if stage != "report"}
    (results / "wandb").mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=project,
            group=study,
            job_type="report" if "report" in keys else "experiment",
            name=run["run"],
            id=f"{study}-{keys.get('evaluation', keys.get('report'))}"[:64],
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(results / "wandb"),
            config={**config, "stages": stages, "artefacts": run["artefacts"]},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=True),
        )
    except wandb.Error as error:
        raise ValueError(f"tracking=online: W&B could not be reached ({error}); `wandb login`, or tracking=offline") from error


def figures(wandb, report: Path) -> dict:
    """The report's figures as media; an image belongs to one run, so each run gets its own."""
    return {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted((report / "figures").glob("*.png"))}


def log_layers(tracked, results: Path, run: dict) -> None:
    """Curves over layers: selection shift and output error while quantizing."""
    if "quantization" not in run["artefacts"]:
        return
    diagnostics = json.loads((results / run["artefacts"]["quantization"] / "diagnostics.json").read_text())
    for layer in diagnostics["layers"]:
        values = {f"layer/{name}": v for name, v in layer.items() if isinstance(v, float)}
        tracked.log({"layer": layer["layer"], **values})


def main() -> None:
    report, out, project = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    try:
        sent = mirror(report, out.parent.name, project)
    except ValueError as error:
        sys.exit(f"moepress: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"report": report.name, "project": project, "runs": sent})


if __name__ == "__main__":
    main()
