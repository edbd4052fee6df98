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
    ColorBar,
    ColumnDataSource,
    CustomJS,
    FactorRange,
    HoverTool,
    InlineStyleSheet,
    LinearColorMapper,
    Select,
)
from bokeh.palettes import Oranges256
from bokeh.plotting import figure
from bokeh.resources import Resources
from matplotlib.colors import to_hex, to_rgb

from moepress.report import paired
from moepress.report.heatmaps import BIT_COLOURS, MOST_NUMBERS
from moepress.report.reading import first_seeds, methods, reference_of
from moepress.report.run import Run
from moepress.report.style import INK as DARK
from moepress.report.style import series_styles
from moepress.report.table import mean_over_domains
from moepress.wording import decimal

INK = "#808890"
"""Of axes and letters: readable on a light and on a dark page."""
MARKERS = {"o": "circle", "D": "diamond", "d": "diamond_dot", "s": "square", "^": "triangle", "v": "inverted_triangle"}
MARKERS |= {"H": "hex", ">": "triangle_pin", "<": "square_pin", "8": "circle_dot"}
MARKERS |= {"P": "square_cross", "X": "square_x", "*": "star", "p": "circle_cross", "h": "hex_dot"}
"""Matplotlib's, as moepress.report.style gives them out -> Bokeh's."""
LARGEST, SMALLEST = 15, 9
"""Of markers, in pixels: earlier series have larger ones, so that those which lie on each other are seen."""
LEGEND_COLUMNS = 2
"""As many as a phone has room for."""
SELECT = """
:host { color: var(--soft); }
.bk-input { color: var(--ink); background: var(--card); border-color: var(--line); appearance: auto; }
"""
BITS = "bits: "
"""How the titles of the maps of widths begin."""
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
        row["change"] = (
            "" if np.isnan(low) else f"{decimal(100 * np.expm1(change.value), 2)} % [{decimal(low, 2)}, {decimal(high, 2)}]"
        )
        tasks = paired.accurate(own)
        scores = [np.mean([member.task_scores[task]["value"] for task in tasks]) for member in own] if tasks else [np.nan]
        row["accuracy"], row["shift"] = 100 * np.mean(scores), 100 * np.mean([m.metrics["selection_shift"] for m in own])
        row["experts"] = run.shape.top_k * np.mean([member.metrics["active_slots"] for member in own])
        rows.append(row)
    return pd.DataFrame(rows)


def levels(runs: list[Run]) -> pd.DataFrame:
    """The scores of the 16-bit models."""
    rows = []
    for run in (run for run in runs if run.is_reference):
        ppl, ppl_ood = (np.exp(mean_over_domains(run.blocks, domains)[0]) for domains in run.domains)
        scores = [run.task_scores[task]["value"] for task in paired.accurate([run])]
        rows.append({"ppl": ppl, "ppl_ood": ppl_ood, "accuracy": 100 * np.mean(scores) if scores else np.nan, "shift": 0.0})
    return pd.DataFrame(rows)


def dashes(style) -> str | list[int]:
    """Matplotlib's line style as Bokeh's: `'solid'`, `'dotted'`, or pixels on and off."""
    return {"-": "solid", ":": "dotted"}[style] if isinstance(style, str) else [max(1, round(2 * part)) for part in style[1]]


def on_both(colour: str) -> str:
    """Black and the dark greys lighter, so that they are seen on a dark page too."""
    r, g, b = (0.6 * part + 0.4 for part in to_rgb(colour))
    return to_hex((r, g, b)) if max(r, g, b) < 0.61 else colour


def quality(runs: list[Run]):
    """Every method's score against its size, with the 16-bit model's as a line; the score is chosen, methods are hidden by a
    click on their name."""
    data = points(runs)
    if data.empty:
        return None
    shown = {title: name for title, name in METRICS.items() if data[name].notna().any()}
    styles, first = series_styles(runs), next(iter(shown.values()))
    tips = [("", "@title"), ("size", "@mebibytes{0.00} MiB, @bits{0.00} bits a weight"), ("against 16 bits", "@change")]
    tips += [(title, f"@{name}{{0.00}}") for title, name in shown.items()]
    tips += [("experts for each token", "@experts{0.00}"), ("seeds", "@seeds")]
    plot = _figure("checkpoint size (MiB)", next(iter(shown)), height=380 + 22 * -(-data["series"].nunique() // LEGEND_COLUMNS))
    glyphs = []
    if len(base := levels(runs)):
        middle = (data["mebibytes"].min() + data["mebibytes"].max()) / 2
        source = ColumnDataSource(base.assign(middle=middle, name="16 bit"))
        level = plot.hspan(first, source=source, color=INK, line_dash=[6, 4], line_width=1.4)
        words = plot.text("middle", first, "name", source=source, color=INK, y_offset=-3, text_font_size="12px")
        glyphs += [level.glyph, words.glyph]
    sizes = np.linspace(LARGEST, SMALLEST, data["series"].nunique())
    for (series, rows), size in zip(data.groupby("series", sort=False), sizes, strict=True):
        source, style = ColumnDataSource(rows.sort_values("mebibytes")), styles[series]
        look = {"source": source, "color": on_both(style["color"]), "legend_label": series}
        dash, hollow = dashes(style["linestyle"]), style["markerfacecolor"] == "white"
        line = plot.line("mebibytes", first, **look, line_width=1.8, line_dash=dash)
        look |= {"marker": MARKERS[style["marker"]], "size": size, "line_width": 1.5, "fill_alpha": 0 if hollow else 0.35}
        dots = plot.scatter("mebibytes", first, **look)
        plot.add_tools(HoverTool(renderers=[dots], tooltips=tips))
        glyphs += [line.glyph, dots.glyph]
    plot.legend.click_policy = "hide"
    plot.add_layout(plot.legend[0], "below")
    plot.legend[0].update(orientation="horizontal", ncols=LEGEND_COLUMNS, location="left", label_text_color=INK)
    plot.legend[0].update(background_fill_alpha=0, border_line_alpha=0)
    choice = Select(
        title="score", value=next(iter(shown)), options=list(shown), name="score", stylesheets=[InlineStyleSheet(css=SELECT)]
    )
    choose = CustomJS(
        args={"glyphs": glyphs, "columns": shown, "axis": plot.yaxis[0]},
        code="for (const glyph of glyphs) glyph.y = {field: columns[cb_obj.value]}; axis.axis_label = cb_obj.value;",
    )
    choice.js_on_change("value", choose)
    return column(choice, plot, sizing_mode="stretch_width")


# --- layers and experts --------------------------------------------------------------------------------------------------


def maps(runs: list[Run]) -> dict[str, dict]:
    """Title -> the columns of a source with a cell for each layer and expert: the widths of each mixed-precision plan, of the
    first seed of each method, and how often experts are selected in each domain at 16 bits."""
    found, seen = {}, set()
    for run in sorted(first_seeds(runs), key=lambda run: run.width):
        if run.is_mixed and run.artefacts["allocation"] not in seen:
            seen.add(run.artefacts["allocation"])
            found[f"{BITS}{run.title}"] = _cells(run, np.array(run.bits, dtype=np.uint8), 2)
    base = next((run for run in runs if run.is_reference), runs[0])
    for domain in (name for names in base.domains for name in names):
        used_LE = 100 * np.array(base.metrics["domains"][domain]["expert_use"], dtype=np.float32)
        found[f"selections (%): {domain}"] = _cells(base, used_LE, used_LE.min() + 0.6 * np.ptp(used_LE))
    return found


def _cells(run: Run, values_LE: np.ndarray, darker: float) -> dict:
    """The columns of one map, numbers as small as they go. Above the value `darker` a cell's number is white; there are numbers
    in the cells of small maps only."""
    layer, expert = np.indices(values_LE.shape, dtype=np.uint16)
    values = values_LE.ravel()
    columns = {"layer": np.take(run.shape.moe_layers, layer.ravel()).astype(str).tolist(), "expert": expert.ravel()}
    few = values.size <= MOST_NUMBERS
    ink = np.where(values > darker, "white", DARK).tolist()
    return columns | {"value": values} | ({"words": [f"{value:.0f}" for value in values], "ink": ink} if few else {})


def palette(title: str, values: np.ndarray) -> dict:
    """`{palette, low, high}` of a colour mapper: for each width the colour of the report's other map, or a ramp."""
    if not title.startswith(BITS):
        return {"palette": list(Oranges256[::-1]), "low": float(values.min()), "high": float(values.max())}
    widths = range(int(values.min()), int(values.max()) + 1)
    return {"palette": [BIT_COLOURS.get(width, DARK) for width in widths], "low": widths[0] - 0.5, "high": widths[-1] + 0.5}


def experts(runs: list[Run]):
    """One map at a time, chosen by its name; a cell tells its layer, expert and value, and has it in it where there is room."""
    found = maps(runs)
    names = list(found)
    widths = np.concatenate([own["value"] for name, own in found.items() if name.startswith(BITS)] or [[]])
    looks = {}
    for name, own in found.items():
        is_bits = name.startswith(BITS)
        looks[name] = palette(name, widths if is_bits else own["value"]) | {"interval": int(is_bits)}
    layers = list(dict.fromkeys(layer for own in found.values() for layer in own["layer"]))[::-1]
    source = ColumnDataSource(found[names[0]])
    plot = _figure("expert", "layer", height=int(np.clip(110 + 26 * len(layers), 220, 760)), y_range=FactorRange(*layers))
    first = looks[names[0]]
    mapper, ticker = LinearColorMapper(), BasicTicker(min_interval=first["interval"])
    mapper.update(palette=first["palette"], low=first["low"], high=first["high"])
    colour = {"field": "value", "transform": mapper}
    boxes = plot.rect("expert", "layer", 0.94, 0.94, source=source, color=colour)
    if all("words" in own for own in found.values()):
        look = {"text_color": "ink", "text_align": "center", "text_baseline": "middle", "text_font_size": "12px"}
        plot.text("expert", "layer", "words", source=source, **look)
    tips = [("layer", "@layer"), ("expert", "@expert"), ("", "@value{0.[00]}")]
    plot.add_tools(HoverTool(renderers=[boxes], tooltips=tips))
    bar = ColorBar(color_mapper=mapper, ticker=ticker, background_fill_alpha=0, major_label_text_color=INK)
    plot.add_layout(bar, "right")
    plot.x_range.range_padding = plot.grid.grid_line_alpha = 0
    choice = Select(title="map", value=names[0], options=names, name="map", stylesheets=[InlineStyleSheet(css=SELECT)])
    choose = CustomJS(
        args={"maps": found, "mapper": mapper, "ticker": ticker, "looks": looks, "source": source},
        code="const {palette, low, high, interval} = looks[cb_obj.value]; mapper.setv({palette, low, high}); "
        "ticker.min_interval = interval; source.data = maps[cb_obj.value];",
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
