"""What the numbers cost: seconds, processor time and memory of every artefact behind a report, from its provenance.json."""

import numpy as np
import pandas as pd

from moepress.dag import STAGES
from moepress.lookup import StoredArtefact
from moepress.report.readable import Cell, seconds
from moepress.report.run import Run
from moepress.wording import rounded_bytes


def tabulate(runs: list[Run]) -> pd.DataFrame:
    """One row for each artefact that the runs are made of, what is shared once, by stage in the DAG's order.

    seconds: from start to end. cpu_seconds: of all its threads, starting up included. peak_memory_bytes: mapped files included.
    Artefacts that were deleted meanwhile are left out.
    """
    rows = []
    known: dict[str, StoredArtefact] = {}
    for run in runs:
        for folder in run.artefacts.values():
            StoredArtefact(run.results, folder).upstream(known)
    for folder, found in known.items():
        if found.exists:
            made = found.provenance
            cpu = made.get("cpu_seconds", {}).get("total", np.nan)
            numbers = {"seconds": made["seconds"], "cpu_seconds": cpu, "peak_memory_bytes": made["peak_memory_bytes"]}
            rows.append({"stage": made["stage"], "artefact": folder, **numbers, "start": made.get("start")})
    found = pd.DataFrame(rows)
    order = {stage: place for place, stage in enumerate(STAGES)}
    return found.sort_values(["stage", "artefact"], key=lambda column: column.map(order) if column.name == "stage" else column)


def by_stage(costs: pd.DataFrame) -> pd.DataFrame:
    """By stage: artefacts, their seconds and cpu_seconds, and the largest of their peak_memory_bytes."""
    groups = costs.groupby("stage", sort=False)
    return pd.DataFrame(
        {
            "artefacts": groups.size(),
            "seconds": groups["seconds"].sum(),
            "cpu_seconds": groups["cpu_seconds"].sum(min_count=1),
            "peak_memory_bytes": groups["peak_memory_bytes"].max(),
        }
    )


def table(costs: pd.DataFrame) -> tuple[list[str], list[list[str | Cell]]]:
    """For people: the headings, a row for each stage, and one for all."""
    stages = by_stage(costs)
    total = by_stage(costs.assign(stage="all")).iloc[0]
    rows = [_cells(stage, row, total["seconds"]) for stage, row in stages.iterrows()]
    return ["stage", "time", "processor", "memory"], [*rows, _cells("all", total, np.nan)]


def _cells(stage: str, row: pd.Series, total: float) -> list[str | Cell]:
    share = f"{100 * row['seconds'] / total:.0f}\u00a0%" if total > 0 else ""
    processor = "" if np.isnan(row["cpu_seconds"]) else seconds(row["cpu_seconds"])
    took = (seconds(row["seconds"]), share)
    count = f"{row['artefacts']:.0f} artefact{'s' if row['artefacts'] > 1 else ''}"
    return [(stage, count), took, processor, rounded_bytes(row["peak_memory_bytes"])]
