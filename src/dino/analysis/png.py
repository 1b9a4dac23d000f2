"""Charts as matplotlib figures, for `plots/*.png`; without pyplot, so that nothing is shared with a notebook."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dino.analysis.charts import FAINT, MARKS, Chart, Drawing, HeatMap

LINE_STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
DPI = 100


def draw(drawing: Drawing) -> Figure:
    """A figure of its own; `savefig` writes it."""
    height = max(4.0, 0.8 + 0.2 * len(drawing.rows)) if isinstance(drawing, HeatMap) else 4.0
    figure = Figure(figsize=(8, height), dpi=DPI)
    axes = figure.subplots()
    if isinstance(drawing, HeatMap):
        figure.set_layout_engine("tight")  # names of rows are of any length; elsewhere it costs time for nothing
        _heat_map(figure, axes, drawing)
    else:
        figure.subplots_adjust(left=0.11, right=0.97, bottom=0.13, top=0.92)
        _chart(axes, drawing)
    for mark in drawing.marks:
        colour, dash, _ = MARKS[mark.kind]
        axes.axvline(mark.step, color=colour, linestyle=LINE_STYLES[dash], linewidth=0.8, alpha=0.7)
    axes.set_title(_plain(drawing.title), fontsize=11)
    axes.set_xlabel(_plain(drawing.x))
    return figure


def _chart(axes: Axes, chart: Chart) -> None:
    if chart.stacked and chart.curves:
        axes.stackplot(
            chart.curves[0].x,
            [np.nan_to_num(curve.y) for curve in chart.curves],
            labels=[_plain(curve.label) for curve in chart.curves],
            colors=[curve.colour for curve in chart.curves],
            alpha=0.7,
        )
    else:
        for curve in chart.curves:
            axes.plot(
                curve.x,
                curve.y,
                color=curve.colour,
                linestyle=LINE_STYLES[curve.dash],
                linewidth=1.2,
                marker="o" if len(curve.x) < 20 and not curve.faint else None,
                markersize=3,
                alpha=FAINT if curve.faint else 1.0,
                label=_plain(curve.label),
            )
    if chart.log and any(value > 0 for curve in chart.curves for value in curve.y):
        axes.set_yscale("log")
    if chart.log_x:
        axes.set_xscale("log", base=2)
    axes.set_ylabel(_plain(chart.y))
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.curves) > 1:
        axes.legend(fontsize=8, frameon=False)


def _heat_map(figure: Figure, axes: Axes, heat_map: HeatMap) -> None:
    named = any(isinstance(column, str) for column in heat_map.columns)
    columns = np.arange(len(heat_map.columns)) if named else np.array(heat_map.columns, float)
    limits = (-1.0, 1.0) if heat_map.symmetric else (None, None)
    colours = "RdBu_r" if heat_map.symmetric else "viridis"
    rows = np.arange(len(heat_map.rows))
    image = axes.pcolormesh(
        columns, rows, heat_map.values, cmap=colours, vmin=limits[0], vmax=limits[1], shading="nearest"
    )
    if named:
        axes.set_xticks(columns, [_plain(str(column)) for column in heat_map.columns], rotation=90, fontsize=8)
    axes.set_yticks(rows, [_plain(row) for row in heat_map.rows], fontsize=8)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label=_plain(heat_map.unit))


def _plain(text: str) -> str:
    """matplotlib reads `$` as the start of a formula."""
    return text.replace("$", r"\$")
