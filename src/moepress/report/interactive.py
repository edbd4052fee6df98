"""The page's two pictures that answer back: quality against size, and a layer-by-expert map. Drawn in the browser by Bokeh,
whose script is in the page, so that it needs no network.

Everything that stems from data goes in as JSON, never as script; the callbacks below are constants.
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from bokeh.document import Document
from bokeh.layouts import column
from bokeh.models import (
    BasicTicker,
    CDSView,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    FactorRange,
    GroupFilter,
    HoverTool,
    LinearColorMapper,
    Select,
)
from bokeh.palettes import Oranges256
from bokeh.plotting import figure
from bokeh.resources import Resources

from moepress.report import paired
from moepress.report.reading import Run, methods, reference_of
from moepress.report.style import series_styles
from moepress.report.table import mean_over_domains

INK = "#808890"
"""Of axes and letters: readable on a light and on a dark page."""
MARKERS = {"o": "circle", "D": "diamond", "s": "square", "^": "triangle", "v": "inverted_triangle"}
OTHER_MARKER = "plus"
TOOLS = "pan,wheel_zoom,box_zoom,reset,save"


@dataclass(frozen=True)
class Pictures:
    """titles: element id -> the picture's title. data: JSON without `<`, `[documents, what goes where]`, for
    `Bokeh.embed.embed_items`."""

    titles: dict[str, str]
    data: str


def library() -> list[str]:
    """Bokeh's own scripts."""
    return Resources(mode="inline", components=["bokeh", "bokeh-widgets"]).js_raw


def draw(runs: list[Run]) -> Pictures:
    """Both pictures, as far as the runs have something to show."""
    document, titles, roots = Document(), {}, {}
    for name, title, model in (
        ("live-quality", "Quality against size", quality(runs)),
        ("live-experts", "Layers and experts", experts(runs)),
    ):
        if model is not None:
            document.add_root(model)
            titles[name], roots[model.id] = title, name
    where = [{"docid": "page", "roots": roots, "root_ids": list(roots)}]
    data = json.dumps(renumbered([{"page": document.to_json(deferred=False)}, where], {}))
    return Pictures(titles, data.replace("<", "\\u003c"))


def renumbered(value, ids: dict[str, str]):
    """Bokeh's JSON with its models numbered from 0, instead of on from those of the page before: the same bytes for the same
    runs. What stems from data never stands under a key of its own."""
    if isinstance(value, list | tuple):
        return [renumbered(each, ids) for each in value]
    if not isinstance(value, dict):
        return value

    def new(name: str) -> str:
        return ids.setdefault(name, f"m{len(ids)}")

    found: dict = {}
    for key, each in value.items():
        if key == "id":
            found[key] = new(each)
        elif key == "roots" and isinstance(each, dict):
            found[key] = {new(name): element for name, element in each.items()}
        elif key == "root_ids":
            found[key] = [new(name) for name in each]
        else:
            found[key] = renumbered(each, ids)
    return found


# --- quality against size ------------------------------------------------------------------------------------------------


METRICS = {
    "perplexity, domains of the corpus": "ppl",
    "perplexity, out of domain": "ppl_ood",
    "accuracy, mean over the tasks (%)": "accuracy",
    "changed selections (%)": "shift",
}


def points(runs: list[Run]) -> pd.DataFrame:
    """One row for each compressed method: its size and what it scores, means over its seeds."""
    rows = []
    for own in methods(run for run in runs if not run.is_reference):
        run, reference = own[0], reference_of(own[0], runs)
        inside, outside = run.domains
        row = {"series": run.series, "title": run.title, "seeds": len(own), "mebibytes": run.checkpoint_bytes / 2**20}
        row["bits"] = 8 * run.checkpoint_bytes / run.num_weights
        for name, domains in (("ppl", inside), ("ppl_ood", outside)):
            row[name] = np.exp(np.mean([mean_over_domains(member.blocks, domains)[0] for member in own]))
        change = paired.increase(own, [reference], inside) if reference else paired.NOTHING
        low, high = (100 * np.expm1(bound) for bound in change.interval)
        row["change"] = "" if np.isnan(low) else f"{100 * np.expm1(change.value):+.2f} % [{low:+.2f}, {high:+.2f}]"
        tasks = paired.accurate(own)
        scores = [np.mean([member.tasks[task]["value"] for task in tasks]) for member in own] if tasks else [np.nan]
        row["accuracy"], row["shift"] = 100 * np.mean(scores), 100 * np.mean([m.metrics["selection_shift"] for m in own])
        row["experts"] = run.shape.top_k * np.mean([member.metrics["active_slots"] for member in own])
        rows.append(row)
    return pd.DataFrame(rows)


def quality(runs: list[Run]):
    """Every method's score against its size; the score is chosen, methods are hidden by a click on their name."""
    data = points(runs)
    if data.empty:
        return None
    shown = {title: name for title, name in METRICS.items() if data[name].notna().any()}
    styles, first = series_styles(runs), next(iter(shown.values()))
    tips = [("", "@title"), ("size", "@mebibytes{0.00} MiB, @bits{0.00} bits a weight"), ("against 16 bits", "@change")]
    tips += [(title, f"@{name}{{0.00}}") for title, name in shown.items()]
    tips += [("experts for each token", "@experts{0.00}"), ("seeds", "@seeds")]
    plot = _figure("checkpoint size (MiB)", next(iter(shown)), height=460)
    glyphs = []
    for series, rows in data.groupby("series", sort=False):
        source = ColumnDataSource(rows.sort_values("mebibytes"))
        colour, marker = styles[series]["color"], MARKERS.get(styles[series]["marker"], OTHER_MARKER)
        line = plot.line("mebibytes", first, source=source, color=colour, line_width=1.8, legend_label=series)
        dots = plot.scatter("mebibytes", first, source=source, color=colour, marker=marker, size=10, legend_label=series)
        plot.add_tools(HoverTool(renderers=[dots], tooltips=tips))
        glyphs += [line.glyph, dots.glyph]
    plot.legend.click_policy = "hide"
    plot.add_layout(plot.legend[0], "below")
    plot.legend[0].update(orientation="horizontal", ncols=2, location="left", label_text_color=INK)
    plot.legend[0].update(background_fill_alpha=0, border_line_alpha=0)
    choice = Select(title="score", value=next(iter(shown)), options=list(shown), name="score", styles={"color": INK})
    choose = CustomJS(
        args={"glyphs": glyphs, "columns": shown, "axis": plot.yaxis[0]},
        code="for (const glyph of glyphs) glyph.y = {field: columns[cb_obj.value]}; axis.axis_label = cb_obj.value;",
    )
    choice.js_on_change("value", choose)
    return column(choice, plot, sizing_mode="stretch_width")


# --- layers and experts --------------------------------------------------------------------------------------------------


def cells(runs: list[Run]) -> pd.DataFrame:
    """One row for each layer and expert of everything that can be mapped: the widths of each mixed-precision plan, and how
    often experts are selected in each domain at 16 bits."""
    frames, seen = [], set()
    for run in sorted(runs, key=lambda run: run.width):
        if run.is_mixed and run.artefacts["allocation"] not in seen:
            seen.add(run.artefacts["allocation"])
            seed = f", seed {run.seed}" if len({other.seed for other in runs}) > 1 else ""
            frames.append(_cells(f"bits: {run.title}{seed}", run, np.array(run.bits, dtype=float)))
    base = next((run for run in runs if run.is_reference), runs[0])
    for domain in (name for names in base.domains for name in names):
        frames.append(_cells(f"selections (%): {domain}", base, 100 * np.array(base.metrics["domains"][domain]["expert_use"])))
    return pd.concat(frames, ignore_index=True)


def _cells(title: str, run: Run, values_LE: np.ndarray) -> pd.DataFrame:
    layer, expert = np.indices(values_LE.shape)
    layers = np.take(run.shape.moe_layers, layer.ravel()).astype(str)
    return pd.DataFrame({"map": title, "layer": layers, "expert": expert.ravel(), "value": values_LE.ravel()})


def experts(runs: list[Run]):
    """One map at a time, chosen by its name; a cell tells its layer, expert and value."""
    data = cells(runs)
    names = list(dict.fromkeys(data["map"]))
    ranges = {name: [float(own.min()), float(own.max())] for name, own in data.groupby("map")["value"]}
    layers = list(dict.fromkeys(data["layer"]))[::-1]
    source, shown = ColumnDataSource(data), GroupFilter(column_name="map", group=names[0])
    plot = _figure("expert", "layer", height=int(np.clip(110 + 26 * len(layers), 220, 760)), y_range=FactorRange(*layers))
    mapper = LinearColorMapper(palette=Oranges256[::-1], low=ranges[names[0]][0], high=ranges[names[0]][1])
    colour = {"field": "value", "transform": mapper}
    boxes = plot.rect("expert", "layer", 0.94, 0.94, source=source, view=CDSView(filter=shown), color=colour)
    tips = [("layer", "@layer"), ("expert", "@expert"), ("", "@value{0.[00]}")]
    plot.add_tools(HoverTool(renderers=[boxes], tooltips=tips))
    bar = ColorBar(color_mapper=mapper, ticker=BasicTicker(), background_fill_alpha=0, major_label_text_color=INK)
    plot.add_layout(bar, "right")
    plot.x_range.range_padding = plot.grid.grid_line_alpha = 0
    choice = Select(title="map", value=names[0], options=names, name="map", styles={"color": INK})
    choose = CustomJS(
        args={"shown": shown, "mapper": mapper, "ranges": ranges, "source": source},
        code="shown.group = cb_obj.value; [mapper.low, mapper.high] = ranges[cb_obj.value]; source.change.emit();",
    )
    choice.js_on_change("value", choose)
    return column(choice, plot, sizing_mode="stretch_width")


def _figure(x_label: str, y_label: str, height: int, **options):
    plot = figure(
        height=height, sizing_mode="stretch_width", tools=TOOLS, x_axis_label=x_label, y_axis_label=y_label, **options
    )
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_alpha, plot.toolbar.logo, plot.toolbar.autohide = 0.3, None, True
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = INK, 0.2
    for axis in plot.axis:
        axis.update(axis_label_text_color=INK, major_label_text_color=INK, axis_line_color=INK)
        axis.update(major_tick_line_color=INK, minor_tick_line_color=None)
    return plot
