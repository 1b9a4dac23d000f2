"""Charts as plotly figures, for the page: plain JSON whose texts are escaped, since plotly reads them as HTML."""

import html
import math
from collections.abc import Sequence
from typing import Any

from dino.analysis.charts import FAINT, MARKS, Chart, Curve, Drawing, HeatMap, Mark

AXIS = {
    "automargin": True,
    "gridcolor": "#eeeeee",
    "linecolor": "#444444",
    "showgrid": True,
    "ticks": "outside",
    "zeroline": False,
}
WORDS_A_LINE = 12


def figure_of(drawing: Drawing) -> dict[str, Any]:
    """`data` and `layout`."""
    data, layout = _heat_map(drawing) if isinstance(drawing, HeatMap) else _chart(drawing)
    data += _mark_points(drawing.marks)
    layout |= {
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 60, "r": 20, "t": 45, "b": 50},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "shapes": [_mark_line(mark) for mark in drawing.marks],
    }
    if drawing.marks:  # an axis of their own, so that they stay at the top
        layout["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return {"data": data, "layout": layout}


def _chart(chart: Chart) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    layout: dict[str, Any] = {
        "height": 320,
        "showlegend": len(chart.curves) > 1,
        "xaxis": {**AXIS, "title": {"text": escaped(chart.x)}, "type": "log" if chart.log_x else "linear"},
        "yaxis": {**AXIS, "title": {"text": escaped(chart.y)}, "type": "log" if chart.log else "linear"},
    }
    values = {value for curve in chart.curves for value in curve.y if math.isfinite(value)}
    if len(values) == 1 and not chart.log:  # plotly would show one below and one above, whatever the size
        (level,) = values
        layout["yaxis"]["range"] = sorted((0.0, 2 * level)) if level else [-1, 1]
    if chart.log:
        layout["yaxis"] |= {"exponentformat": "power", "dtick": 1} if _decades(chart) >= 1 else {}
    return [_line(curve, chart.stacked, chart.log) for curve in chart.curves], layout


def _line(curve: Curve, stacked: bool, log: bool) -> dict[str, Any]:
    line: dict[str, Any] = {
        "type": "scatter",
        "x": [_number(value) for value in curve.x],
        "y": [None if log and not value > 0 else _number(value) for value in curve.y],
        "name": escaped(curve.label),
        "mode": "lines+markers" if len(curve.x) < 20 and not curve.faint else "lines",
        "line": {"color": curve.colour, "width": 1.5, "dash": curve.dash},
        "opacity": FAINT if curve.faint else 1.0,
    }
    return line | ({"stackgroup": "all", "line": {"color": curve.colour, "width": 0.5}} if stacked else {})


def _heat_map(heat_map: HeatMap) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": [escaped(each) if isinstance(each, str) else each for each in heat_map.columns],
        "y": [escaped(row) for row in heat_map.rows],
        "z": [[_number(value) for value in row] for row in heat_map.values.tolist()],
        "colorscale": "RdBu" if heat_map.symmetric else "Viridis",
        "colorbar": {"title": {"text": escaped(heat_map.unit), "side": "right"}, "thickness": 12},
        "hovertemplate": "%{y}<br>%{x}: %{z:.3g}<extra></extra>",
    }
    trace |= {"zmin": -1, "zmax": 1} if heat_map.symmetric else {}
    axis = {"automargin": True, "ticks": "outside"}
    layout = {
        "height": max(320, 80 + 20 * len(heat_map.rows)),
        "showlegend": False,
        "xaxis": {**axis, "title": {"text": escaped(heat_map.x)}},
        "yaxis": {**axis, "autorange": "reversed"},
    }
    return [trace], layout


def _mark_line(mark: Mark) -> dict[str, Any]:
    colour, dash, _ = MARKS[mark.kind]
    place = {"type": "line", "x0": mark.step, "x1": mark.step, "yref": "paper", "y0": 0, "y1": 1}
    return place | {"line": {"color": colour, "width": 1, "dash": dash}, "opacity": 0.7}


def _mark_points(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Where the pointer finds the words of a mark: at the top of its line."""
    traces = []
    for kind, (colour, _, name) in MARKS.items():
        found = [mark for mark in marks if mark.kind == kind]
        if found:
            trace: dict[str, Any] = {
                "type": "scatter",
                "mode": "markers",
                "yaxis": "y2",
                "name": name,
                "showlegend": False,
            }
            trace |= {"x": [mark.step for mark in found], "y": [0.98] * len(found)}
            trace |= {"text": [_folded(mark.text) for mark in found], "hovertemplate": "%{text}<extra></extra>"}
            traces.append(trace | {"marker": {"color": colour, "symbol": "triangle-down", "size": 8}})
    return traces


def _folded(text: str) -> str:
    words = escaped(text).split()
    return "<br>".join(" ".join(words[at : at + WORDS_A_LINE]) for at in range(0, len(words), WORDS_A_LINE))


def escaped(text: object) -> str:
    """Text as text: no tags, and no `$formula$`, for which plotly would want another script."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def _number(value: float) -> float | None:
    """Five digits are more than a screen shows; JSON has no NaN."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")


def _decades(chart: Chart) -> float:
    values = [value for curve in chart.curves for value in curve.y if value > 0]
    return math.log10(max(values) / min(values)) if values else 0.0
