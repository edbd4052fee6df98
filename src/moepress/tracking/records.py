"""What a W&B run holds, for every artefact of a report, every row of its table, and the report itself. Knows no W&B."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import pandas as pd

from moepress.artefacts import read_json
from moepress.lookup import StoredArtefact
from moepress.models import folders
from moepress.report.run import shift_by_layer
from moepress.secrets import without_secrets

VERSION = 2
"""Raised by hand when records of the same artefacts change, so that they are sent again."""
MEASURED = {
    "corpus": (("summary.json",),),
    "model": (("carving.json",), ("specialisation.json",)),
    "allocation": (("allocation.json",),),
    "quantization": (("size.json",), ("timing.json",)),
    "pruning": (("policy.json",),),
    "evaluation": (("metrics.json",), ("tasks.json", "moepress", "scores")),
    "divergence": (("divergence.json",),),
    "decomposition": (("decomposition.json",),),
    "latency": (("latency.json",),),
}
"""Stage -> the files, with the keys inside, whose numbers are its run's summary; those that are not there are passed over."""
MOST_TEXT = 200
"""Characters of a text that is still a value of the summary."""


@dataclass(frozen=True)
class Record:
    """One W&B run. id: of its artefact's key, or of a row's keys. generation: 1 + that of what it uses, for the order.

    curves: the rows of its history. uses, makes: artefacts that it reads and the one it leaves.
    media: makes the pictures (files or arrays of pixels) and tables by name; costs time, so only called where they are sent.
    """

    id: str
    name: str
    group: str
    job_type: str
    generation: int
    config: dict
    summary: dict
    curves: list[dict]
    uses: tuple[StoredArtefact, ...]
    makes: StoredArtefact | None
    media: Callable[[], dict[str, Path | np.ndarray | pd.DataFrame]]

    @property
    def digest(self) -> str:
        """A hash of all that is sent but the group: an artefact's run stays in the group of the study that first had it."""
        content = [VERSION, self.id, self.name, self.job_type, self.config, self.summary, self.curves]
        content += [[item.folder for item in self.uses], self.makes and self.makes.folder]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def of_report(report: StoredArtefact) -> tuple[list[Record], list[str]]:
    """A run for every artefact that a report was made from, then for every row of its table, then for the report; and a
    line for each of them of which a file is missing or damaged.

    What a run uses comes before it. Raises OSError or ValueError where the report itself is not whole.
    """
    group, items = group_of(report), ordered(report)
    generations: dict[str, int] = {}
    for folder, item in items.items():
        generations[folder] = 1 + max((generations.get(upstream, 0) for upstream in inputs(item)), default=0)
    last = generations[report.folder]
    makers = [
        (folder, partial(of_artefact, item, items, group, generations[folder]))
        for folder, item in items.items()
        if item.stage != "report"
    ]
    table = pd.read_csv(report.path / "runs.csv").drop(columns="keys")
    for row, run in zip(table.to_dict("records"), report.described["config"]["runs"], strict=True):
        makers.append((run["run"], partial(of_row, row, run, items, group, last)))
    makers.append((report.folder, partial(of_page, report, items, group, last)))
    records, failures = [], []
    for name, make in makers:
        try:
            records.append(make())
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return records, failures


def group_of(report: StoredArtefact) -> str:
    """The study, or the label of a single experiment; of a sweep the report's id, for all sweeps are called `experiments`."""
    name = report.described["config"]["name"]
    return report.path.name if name == "experiments" else name


def inputs(item: StoredArtefact) -> list[str]:
    """Folders that it was made from, each once."""
    return list(dict.fromkeys(item.described["inputs"].values()))


def ordered(report: StoredArtefact) -> dict[str, StoredArtefact]:
    """Folder -> the artefact itself and all that it was made from, upstream first; without those that were deleted."""
    found: dict[str, StoredArtefact] = {}

    def visit(item: StoredArtefact) -> None:
        if item.folder in found or not item.exists:
            return
        for folder in inputs(item):
            visit(StoredArtefact(item.results, folder))
        found[item.folder] = item

    visit(report)
    return found


def of_artefact(item: StoredArtefact, items: dict[str, StoredArtefact], group: str, generation: int) -> Record:
    """The run of a stage: its id is the artefact's key, its config what the key is made of."""
    made = item.provenance
    origin = {name: made[name] for name in ("start", "git_commit", "device", "machine", "versions")}
    config = {**item.described["config"], "artefact": item.folder, "key": item.key, "inputs": item.described["inputs"]}
    summary = cost(item)
    for name, *keys in MEASURED.get(item.stage, ()):
        if (item.path / name).is_file():
            summary |= numbers(reduce(dict.__getitem__, keys, read_json(item.path / name)))
    own = {item.stage: item}
    return Record(
        id=item.key,
        name=item.path.name,
        group=group,
        job_type=item.stage,
        generation=generation,
        config=without_secrets({**config, "made": origin}),
        summary=without_secrets(summary),
        curves=training(item) if item.stage == "model" else by_layer(own, moe_layers(item)),
        uses=tuple(items[folder] for folder in inputs(item) if folder in items),
        makes=item,
        media=lambda: pictures(own),
    )


def of_row(row: dict, run: dict, items: dict[str, StoredArtefact], group: str, generation: int) -> Record:
    """The run of an experiment: the configuration of all its stages, and its row of runs.csv as the summary.

    row: of the table; run: the same one's entry in the report's configuration. A run of W&B is in one group, so an
    experiment has a run in each study or sweep that it is part of.
    """
    row = {name: value for name, value in row.items() if pd.notna(value)}
    own = {stage: items[folder] for stage, folder in run["artefacts"].items() if folder in items}
    identity = json.dumps([group, sorted(run["artefacts"].values())])
    config = resolved(run, own.values(), items)
    config |= {"study": group, "artefacts": run["artefacts"]}
    config |= {"experiment": {name: value for name, value in row.items() if isinstance(value, str)}}
    return Record(
        id=hashlib.sha256(identity.encode()).hexdigest()[:12],
        name=without_secrets(run["run"]),
        group=group,
        job_type="experiment",
        generation=generation,
        config=without_secrets(config),
        summary=without_secrets(row),
        curves=by_layer(own, moe_layers(own["model"]) if "model" in own else ()),
        uses=tuple(own.values()),
        makes=None,
        media=lambda: pictures(own),
    )


def of_page(report: StoredArtefact, items: dict[str, StoredArtefact], group: str, generation: int) -> Record:
    """The run of a report: its table and those of its figures, and the figures."""
    described = report.described["config"]
    config = {"study": group, "caption": described["caption"], "artefact": report.folder, "key": report.key}
    folders = dict.fromkeys(folder for run in described["runs"] for folder in run["artefacts"].values())

    def media() -> dict:
        found: dict = {"runs": pd.read_csv(report.path / "runs.csv").drop(columns="keys")}
        for path in sorted((report.path / "figures").glob("*.png")):
            found[f"figures/{path.stem}"] = path
            if path.with_suffix(".csv").is_file():
                found[f"tables/{path.stem}"] = pd.read_csv(path.with_suffix(".csv"))
        return found

    return Record(
        id=report.key,
        name=f"{described['name']} (table and figures)",
        group=group,
        job_type="report",
        generation=generation,
        config=without_secrets(config),
        summary={"experiments": len(described["runs"]), **cost(report)},
        curves=[],
        uses=tuple(items[folder] for folder in folders if folder in items),
        makes=report,
        media=media,
    )


def resolved(run: dict, own: Iterable[StoredArtefact], items: dict[str, StoredArtefact]) -> dict:
    """An experiment's configuration: each group with every key that one of its stages read, upstream ones included."""
    groups = {name: dict(run[name]) for name in ("quantization", "allocation", "pruning")}
    if run["is_reference"]:
        groups.pop("allocation")  # nothing is allocated
    stages: dict[str, StoredArtefact] = {}
    for item in own:
        stages |= ordered(item)
    for folder in stages:
        for name, group in items[folder].described["config"].items():
            groups.setdefault(name, {}).update(group)
    return {**groups, "seed": run["seed"]}


def cost(item: StoredArtefact) -> dict:
    """What making an artefact took, and the bytes of its files."""
    made = item.provenance
    found = {name: made[name] for name in ("seconds", "peak_memory_bytes")}
    found["cpu_seconds"] = made.get("cpu_seconds", {}).get("total")
    return found | {"bytes": sum(entry["bytes"] for entry in made["files"].values())}


def numbers(value: dict) -> dict:
    """Its numbers and short texts, nested as they are; without lists."""
    found: dict = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= {name: inner} if (inner := numbers(item)) else {}
        elif isinstance(item, int | float) or (isinstance(item, str) and len(item) <= MOST_TEXT):
            found[name] = item
    return found


def training(model: StoredArtefact) -> list[dict]:
    """The loss curve of a model that was trained here."""
    path = model.path / "training.csv"
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    return [{f"training/{name}": value for name, value in row.items() if pd.notna(value)} for row in rows]


def by_layer(own: dict[str, StoredArtefact], layers: tuple[int, ...]) -> list[dict]:
    """A row for each MoE layer: mean bits, what quantizing it changed on the calibration text, and the selections that
    differ from 16 bits on the test text. own: stage -> artefact; layers: the numbers of the MoE layers, () where unknown."""
    rows: dict[int, dict] = {}
    if "allocation" in own:
        for layer, bits_E in bits_of(own["allocation"]):
            rows.setdefault(layer, {})["allocation/mean_bits"] = sum(bits_E) / len(bits_E)
    if "quantization" in own:
        for found in read_json(own["quantization"].path / "diagnostics.json")["layers"]:
            row = rows.setdefault(found["layer"], {})
            row |= {f"quantization/{name}": value for name, value in found.items() if isinstance(value, float)}
            row["quantization/starved_experts"] = len(found.get("starved", []))
            if found.get("expert_errors"):
                row["quantization/worst_expert_error"] = max(found["expert_errors"])
    if "evaluation" in own:
        shift_L = shift_by_layer(read_json(own["evaluation"].path / "metrics.json"))
        for row, shift in enumerate(shift_L):
            rows.setdefault(layers[row] if layers else row, {})["evaluation/selection_shift"] = shift
    return [{"layer": layer, **rows[layer]} for layer in sorted(rows)]


def bits_of(allocation: StoredArtefact) -> Iterator[tuple[int, list[int]]]:
    """Every MoE layer's number with the widths of its experts."""
    found = read_json(allocation.path / "allocation.json")
    return zip(found["layers"], found["bits"], strict=True)


def moe_layers(item: StoredArtefact) -> tuple[int, ...]:
    """Numbers of the MoE layers of the model behind an artefact; () where there is none, or its files are gone."""
    models = [found.path for found in ordered(item).values() if found.stage == "model"]
    return _moe_layers(models[0]) if models else ()


@cache
def _moe_layers(model: Path) -> tuple[int, ...]:
    try:
        return folders.read_shape(folders.locate(model), "model").moe_layers
    except (ValueError, OSError):
        return ()


def pictures(own: dict[str, StoredArtefact]) -> dict:
    """The allocation among these artefacts (stage -> artefact) as a heat map of its bits and as a table; {} without one."""
    if "allocation" not in own:
        return {}
    layers, bits_LE = zip(*bits_of(own["allocation"]), strict=True)
    rows = [(layer, expert, bits) for layer, bits_E in zip(layers, bits_LE, strict=True) for expert, bits in enumerate(bits_E)]
    table = pd.DataFrame(rows, columns=["layer", "expert", "bits"])
    return {"allocation/bits": heat_map(own["allocation"].path), "allocation/table": table}


@cache
def heat_map(allocation: Path) -> np.ndarray:
    """The widths of an allocation's experts as a picture, `[height, width, RGBA]`."""
    from moepress.report import heatmaps, style  # matplotlib: only where something is drawn

    layers, bits_LE = zip(*bits_of(StoredArtefact(allocation.parent.parent, f"allocation/{allocation.name}")), strict=True)
    with style.plt.rc_context({**style.RC, "figure.dpi": style.RC["savefig.dpi"]}):
        figure = heatmaps.allocation(allocation.name.rpartition("-")[0], bits_LE, layers)
        figure.canvas.draw()
        picture = np.array(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
        style.plt.close(figure)
    return picture
