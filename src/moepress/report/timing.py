"""The figure of times over batch and length, and of how close they are to what the device allows."""

import itertools

import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from moepress.report.reading import first_seeds
from moepress.report.run import Run
from moepress.report.style import METHOD_COLOURS, MUTED, OTHER_COLOURS, plt, shorten

COLOURS = [colour for name, colour in METHOD_COLOURS.items() if name != "none"] + list(OTHER_COLOURS)
MARKERS = "oDs^v<>Ph"
SIXTEEN = {"16bit": ("16 bit", (0, (5, 3))), "16bit-eager": ("16 bit, plain experts", (0, (1, 2)))}
"""Models that all are timed beside: their names and lines."""
PHASES = {"decode": "a step of decoding", "prefill": "a prefill"}


def latency(runs: list[Run]) -> tuple[Figure, pd.DataFrame] | None:
    """Time above and share of the limit below, decoding left and prefill right; a line for each size and policy."""
    data = numbers(runs)
    if data.empty:
        return None
    names = list(dict.fromkeys(data["name"]))
    styles = line_styles(names)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), sharex="col")
    for column, (phase, what) in enumerate(PHASES.items()):
        above, below = axes[:, column]
        for name in names:
            rows = data[(data["name"] == name) & (data["phase"] == phase)].sort_values("x")
            bars = [rows["ms"] - rows["q1"], rows["q3"] - rows["ms"]]
            above.errorbar(rows["x"], rows["ms"], bars, capsize=3, elinewidth=1.2, **styles[name])
            below.plot(rows["x"], 100 * rows["share"], **styles[name])
        above.set(title=f"Time of {what} (ms)", yscale="log")
        below.set(title="Share of the limit (%)", yscale="log", xscale="log")
        below.set_xlabel("sequences in the batch" if phase == "decode" else "tokens in the batch")
        places = sorted(data.loc[data["phase"] == phase, "x"].unique())
        below.set_xticks(places, [f"{place:g}" for place in places])
        below.xaxis.set_minor_locator(ticker.NullLocator())
        below.axhline(100, color=MUTED, linewidth=1.2)
        for axis in (above, below):
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.margins(x=0.08, y=0.1)
    handles = [plt.Line2D([], [], label=shorten(name), **styles[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), handlelength=3)
    return figure, data


def numbers(runs: list[Run]) -> pd.DataFrame:
    """A row for each line and setting."""
    timed = [run for run in first_seeds(runs) if run.latency["rows"]]
    base = next((run for run in timed if run.is_reference), timed[0] if timed else None)
    found = []
    if base:
        for model, (name, _) in SIXTEEN.items():
            found += [line(name, base, row) for row in base.latency["rows"] if row["model"] == model]
    once: dict[str, Run] = {}
    for run in sorted(timed, key=lambda run: (run.is_pruned, -run.width)):
        if not run.is_reference:
            once.setdefault(size_and_policy(run), run)
    for name, run in once.items():
        found += [line(name, run, row) for row in run.timed]
    return pd.DataFrame(found)


def size_and_policy(run: Run) -> str:
    """What a time depends on: `2.5 bits, mixed`, `3 bits + PESF 0.3`."""
    size = f"{run.target}, mixed" if run.is_mixed else run.target
    return f"{size} + {run.pruning_label}" if run.is_pruned else size


def line(name: str, run: Run, row: dict) -> dict:
    times = row["graph_ms"] or row["ms"]
    x = row["batch"] if row["phase"] == "decode" else row["batch"] * row["length"]
    found = {"name": name, "run": run.name, "phase": row["phase"], "batch": row["batch"], "length": row["length"], "x": x}
    found |= {"ms": times["median"], "q1": times["q1"], "q3": times["q3"], "is_graph": row["graph_ms"] is not None}
    found |= {"limit_ms": row["limit_ms"], "limited_by": row["limited_by"], "share": row["share"]}
    found |= {"must_move_bytes": row["must"]["bytes"], "flops": row["must"]["flops"], "experts_read": row["must"]["used"]}
    return found | {"memory_bytes": row["memory_bytes"], "memory_is": row["memory_is"], "device": run.latency["device"]}


def line_styles(names: list[str]) -> dict[str, dict]:
    """16 bit in grey, every other line in a colour and with a marker of its own; hollow where experts are pruned."""
    greys = {name: dash for name, dash in SIXTEEN.values()}
    looks, found = itertools.cycle(zip(COLOURS, itertools.cycle(MARKERS), strict=False)), {}
    for name in names:
        if name in greys:
            face = "white" if name == SIXTEEN["16bit-eager"][0] else "#4d4d4d"
            found[name] = {"color": "#4d4d4d", "linestyle": greys[name], "marker": "o", "markerfacecolor": face}
            continue
        colour, marker = next(looks)
        is_pruned = " + " in name
        face = "white" if is_pruned else colour
        found[name] = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": ":" if is_pruned else "-"}
    return found
