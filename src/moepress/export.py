"""A publishable folder of a packed checkpoint: its files, the tokenizer, and a model card with what was measured.

from moepress.export import export
export("results/quantization/qesc-pmq-2.5-…", "my-model", results="results/report/qesc-pmq-2.5-…")
"""

import csv
import json
import math
import os
import shutil
from pathlib import Path

from moepress import integrity
from moepress.artefacts import read_json
from moepress.inference import manifest
from moepress.report import card

FACTS = "card.json"
README = "README.md"
NUMBERS = ("delta_nll", "delta_nll_stderr", "delta_acc", "delta_acc_stderr", "limit")
NUMBERS += ("prefill_ms", "decode_ms", "speedup_prefill", "speedup_decode")
"""Columns of runs.csv that a card takes as they are."""


def export(checkpoint: str | Path, out: str | Path, results: str | Path | None = None) -> Path:
    """Make the folder `out`, whole or not at all, ready for the hub: `moepress.load(out)` and `from_pretrained` take it.

    checkpoint: a folder of the stage quantization. results: a report's folder (or its runs.csv) with a row of this
    checkpoint, for the card's results; without it the card says that nothing was measured. Shards are hard links where the
    file system allows; the small files are copies, so that an edit of the export leaves the checkpoint alone.
    Returns `out`. Raises ValueError for a damaged checkpoint, a report without it, and an `out` that holds anything but an
    earlier export of the same checkpoint.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not (checkpoint / FACTS).is_file() or not (checkpoint / manifest.INDEX).is_file():
        raise ValueError(f"{checkpoint}: no packed checkpoint with its {FACTS}; give a folder of results/quantization/")
    manifest.check(checkpoint)
    facts = read_json(checkpoint / FACTS)
    text = card.render(facts, measured(Path(results), facts["key"]) if results else None)
    files = [*manifest.read_index(checkpoint)["metadata"]["files"], manifest.INDEX, FACTS]
    check_replaceable(out, checkpoint, facts["key"], {*files, README})

    out.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        beside.mkdir()
        for name in files:
            place(checkpoint / name, beside / name)
        (beside / README).write_text(text, encoding="utf-8")
        if out.exists():
            out.rename(old)
        beside.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (beside, old):
            shutil.rmtree(folder, ignore_errors=True)
    return out


def place(source: Path, target: Path) -> None:
    """A hard link for a shard, a copy for any other file and where there can be no link."""
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def check_free(out: Path, key: str) -> None:
    """Raise ValueError unless `out` can be made and is absent, empty, or an export of the checkpoint `key`: what can be told
    before there is that checkpoint."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{out}: cannot be made, for {above} is no folder that can be written; give another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; give the name of a folder")
    try:
        is_same = read_json(out / FACTS)["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    if any(out.iterdir()) and not is_same:
        raise ValueError(f"{out}: not empty, and no export of this checkpoint ({key}); give another folder or empty it")


def check_replaceable(out: Path, checkpoint: Path, key: str, files: set[str]) -> None:
    """Raise ValueError unless `out` is absent, empty, or an earlier export of the same checkpoint and nothing else."""
    check_free(out, key)
    if out.exists() and out.resolve() == checkpoint.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; give another folder")
    added = sorted(path.name for path in out.iterdir() if path.name not in files) if out.exists() else []
    if added:
        raise ValueError(f"{out}: holds {added[0]}, which no export wrote; move it away or give another folder")


def measured(report: Path, key: str) -> dict:
    """What a report measured of the checkpoint `key` beside its 16-bit model, for `card.render`.

    report: its folder or its runs.csv. The row is that of the checkpoint without pruning. Raises ValueError without one.
    """
    path = report / "runs.csv" if report.is_dir() else report
    if not path.is_file():
        raise ValueError(f"{path}: not there; give a report's folder (results/report/...) or its runs.csv")
    if integrity.is_whole(path.parent):  # else a table that lies by itself
        integrity.check([(path.parent, True)], path.parent.parent.parent)
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict] = [row | {"keys": json.loads(row["keys"])} for row in csv.DictReader(file)]
    plain = [row for row in rows if row["pruning"] == "none"]
    own = next((row for row in plain if row["keys"].get("quantization") == key), None)
    if own is None:
        raise ValueError(f"{path}: no row of the checkpoint {key} without pruning; give a report that measured it")
    same = (row for row in plain if row["method"] == "none" and row["keys"]["model"] == own["keys"]["model"])
    base = next(same, None)
    if base is None:
        raise ValueError(f"{path}: no row of the 16-bit model that the checkpoint {key} was made from")
    return {name: _number(own.get(name)) for name in NUMBERS} | {
        "domains": _domains(own, base),
        "tasks": _tasks(own, base),
        "selection_shift": float(own["selection_shift"]),
        "selection_shift_stderr": float(own["selection_shift_stderr"] or "nan"),
        "bytes16": int(float(base["checkpoint_bytes"])),
        "device": own["device"],
    }


def _domains(own: dict, base: dict) -> list[dict]:
    """The perplexity of each domain with that of the 16-bit model. own, base: rows of runs.csv."""
    names = [name.removeprefix("ppl_") for name in own if name.startswith("ppl_") and f"{name}_stderr" in own]
    return [
        {
            "domain": name,
            "ppl": float(own[f"ppl_{name}"]),
            "ppl_stderr": float(own[f"ppl_{name}_stderr"] or "nan"),
            "ppl16": float(base[f"ppl_{name}"]),
            "ppl16_stderr": float(base[f"ppl_{name}_stderr"] or "nan"),
        }
        for name in names
        if name not in ("mean", "ood") and _number(own[f"ppl_{name}"]) is not None
    ]


def _tasks(own: dict, base: dict) -> list[dict]:
    """The accuracy of each task with that of the 16-bit model; None where that one was not asked."""
    names = [name.removeprefix("acc_") for name in own if name.startswith("acc_") and f"{name}_stderr" in own]
    return [
        {
            "task": name,
            "acc": _number(own[f"acc_{name}"]),
            "acc_stderr": _number(own[f"acc_{name}_stderr"]),
            "acc16": _number(base.get(f"acc_{name}")),
            "acc16_stderr": _number(base.get(f"acc_{name}_stderr")),
        }
        for name in names
        if name != "mean" and _number(own[f"acc_{name}"]) is not None
    ]


def _number(text: str | None) -> float | None:
    """A cell's number; None where it is empty or nan."""
    value = float(text) if text else math.nan
    return None if math.isnan(value) else value
