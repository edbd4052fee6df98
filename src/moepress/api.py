"""`moepress.compress`: what the command does, from Python."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress import execution
from moepress.composing import override_value


@dataclass(frozen=True)
class Compressed:
    """model, tokenizer: loaded, under the pruning policy if there is one. report: the folder with index.html. row: the
    experiment's row of runs.csv. folder: the checkpoint among the results."""

    model: Any
    tokenizer: Any
    report: Path
    row: dict
    folder: Path


def compress(model: str | Path, out: str | Path | None = None, budget: str | int | None = None, **overrides) -> Compressed:
    """Compress a model as `moepress KEY=VALUE ...` does: the same stages, keys and folder of results, so that whatever the
    command has computed is not computed again.

    model: a model folder, the id of a hub model (`org/name`) or "tiny". out: a folder for a copy of the checkpoint, ready to
    publish. budget: the most that the checkpoint's folder may take, as "12GiB" or a number of bytes.
    overrides: any key of conf/, its dots as double underscores: `quantization="gptq", calibration__num_sequences=128`. Without
    `corpus` the calibration text is the default one.

    Raises ValueError for a wrong value, as the command does, and RuntimeError naming the log of a stage that failed.
    """
    given: dict = model_overrides(model)
    given |= {name.replace("__", "."): value for name, value in overrides.items()}
    if "study" in given:
        raise ValueError(f"study={given['study']!r}: compress takes one experiment; `moepress study=NAME` runs a study")
    if budget is not None:
        given["allocation.budget"] = budget
    if out is not None:
        given["out"] = str(out)
    lines = [f"{key}={override_value(value)}" for key, value in given.items()]
    planned = execution.with_checkpoint(execution.planned(lines, execution.Settings()))
    began = time.time()
    if execution.run(planned, [lines]):
        raise RuntimeError(execution.failures(planned, began))
    if out is not None:
        execution.publish(planned, out)
    found = execution.last_run(planned)
    folder = found.get("quantization", found["model"])
    from moepress.inference.checkpoint import load  # imports torch, which what is wrong with the values need not wait for

    loaded, tokenizer = load(folder, given.get("device", "auto"), pruning=execution.policy(planned))
    report = Path(planned.report)
    return Compressed(loaded, tokenizer, report, execution.rows(report)[-1], folder)


def model_overrides(model: str | Path) -> dict[str, str]:
    """The keys that name a model."""
    if str(model) == "tiny":
        return {"model": "tiny"}
    if not Path(model).expanduser().is_dir() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        return {"model": "hub", "model.id": str(model)}
    return {"model": "local", "model.path": str(Path(model).expanduser())}
