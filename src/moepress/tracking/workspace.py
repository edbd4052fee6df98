"""The dashboard: a W&B workspace over the runs of a study, described with W&B's own `wandb-workspaces`."""

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.workspaces import errors

from moepress.tracking.mirror import NotReachable, first_line

COLUMNS = (
    *("config:experiment.value.method", "config:experiment.value.allocation", "config:experiment.value.pruning"),
    *("summary:bits_effective", "summary:checkpoint_bytes", "summary:ppl_mean", "summary:delta_nll", "summary:acc_mean"),
    *("summary:selection_shift", "summary:speedup_prefill", "summary:speedup_decode", "config:seed.value"),
)
"""Of the table of runs, pinned beside their names."""
MOST_RUNS = 100
"""Lines of one panel. W&B's own default, 10, hides most of a study."""


def build(entity: str | None, project: str, group: str | None) -> ws.Workspace:
    """The workspace of one group's experiments and its report, or of all groups."""
    by_name = "${run:displayName}"
    quality = [
        scatter("Perplexity against size", "checkpoint_bytes", "ppl_mean", log_x=True, log_y=True),
        scatter("Nats per token over 16 bit, by bits per weight", "bits_effective", "delta_nll"),
        scatter("Accuracy against size", "checkpoint_bytes", "acc_mean", log_x=True),
        scatter("Perplexity against computed experts", "activated_experts", "ppl_mean", log_y=True),
    ]
    curves = {
        "Changed selections, test text": "evaluation/selection_shift",
        "Changed selections while quantizing, calibration text": "quantization/selection_shift",
        "The same before the router is fitted": "quantization/selection_shift_before_fit",
        "Output error while quantizing": "quantization/output_error",
        "Worst expert's error": "quantization/worst_expert_error",
        "Bits": "allocation/mean_bits",
    }
    by_layer = [
        wr.LinePlot(title=title, x="layer", y=[name], title_x="layer", max_runs_to_show=MOST_RUNS, legend_template=by_name)
        for title, name in curves.items()
    ]
    maps = [
        wr.MediaBrowser(title="Bits of every expert", media_keys=["allocation/bits"], num_columns=3),
        wr.MediaBrowser(title="All allocations beside selection frequency", media_keys=["figures/bits"], num_columns=1),
        wr.MediaBrowser(title="Sensitivity of experts", media_keys=["figures/sensitivity"], num_columns=1),
    ]
    speed = [
        wr.BarPlot(title=title, metrics=[name], max_runs_to_show=MOST_RUNS, max_bars_to_show=MOST_RUNS, orientation="h")
        for title, name in (
            ("Prefill, times 16 bit", "speedup_prefill"),
            ("Decode, times 16 bit", "speedup_decode"),
            ("Seconds to quantize", "quantize_seconds"),
        )
    ]
    table = [
        wr.WeavePanelSummaryTable(table_name="runs", layout=wr.Layout(w=24, h=14)),
        wr.MediaBrowser(title="Paired comparisons", media_keys=["figures/differences"], num_columns=1),
    ]
    whole = ws.SectionLayoutSettings(columns=1, rows=2)
    pair = ws.SectionLayoutSettings(columns=2, rows=2)
    filters = [expr.Metric("JobType").isin(["experiment", "report"])]
    if group is not None:
        filters.append(expr.Metric("Group") == group)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"moepress: {group or 'all studies'}",
        sections=[
            ws.Section("Quality against size", panels=quality, is_open=True, layout_settings=pair),
            ws.Section("Selection shift and errors by layer", panels=by_layer, is_open=True),
            ws.Section("Allocation", panels=maps, is_open=True),
            ws.Section("Table of the study", panels=table, is_open=True, layout_settings=whole),
            ws.Section("Speed and cost", panels=speed),
        ],
        settings=ws.WorkspaceSettings(x_axis="layer", max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            order=[expr.Ordering(expr.Metric("Group")), expr.Ordering(expr.Summary("checkpoint_bytes"))],
            pinned_columns=["run:displayName", *([] if group else ["run:group"]), *COLUMNS],
        ),
    )


def scatter(title: str, x: str, y: str, **options) -> wr.ScatterPlot:
    return wr.ScatterPlot(
        title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y), legend_template="${run:displayName}", **options
    )


def specification(workspace: ws.Workspace) -> dict:
    """What W&B is sent of it."""
    return workspace._to_model().model_dump(by_alias=True, exclude_none=True)


def save(entity: str | None, project: str, group: str | None, known: str | None) -> str:
    """Create the workspace at W&B, or update the one at the address `known` where it is still there; its address.

    Raises NotReachable.
    """
    try:
        made = build(entity or wandb.Api().default_entity, project, group)
        there = found(known) if known else None
        if there is not None:
            there.sections, there.settings, there.runset_settings = made.sections, made.settings, made.runset_settings
            made = there
        made.save()
        return made.url
    except (wandb.Error, OSError) as error:
        raise NotReachable(f"W&B did not take the workspace ({first_line(error)})") from error


def found(address: str) -> ws.Workspace | None:
    """The workspace of that address; None where it was deleted, or is of a version that this package cannot read."""
    try:
        return ws.Workspace.from_url(address)
    except (ValueError, errors.SpecVersionError, errors.UnsupportedViewError):
        return None
