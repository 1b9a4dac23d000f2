"""Pictures of a sweep for its page: all of SVG, so that they are drawn without WebGL."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dino.messages import show
from dino.sweep.collect import EFFECTIVE_RANK, LOSS, Results, Row, Setting, is_number, order, with_unit, words

MAX_POINTS = 400  # of a curve; longer ones are thinned out
MAX_CATEGORIES = 6  # an axis of at most so many values shows each, evenly spaced: 0, 0.9, 0.99, 0.999
LOG_FROM = 50  # largest / smallest value from which an axis of more is logarithmic
SHARE_OF_GRID = 0.5  # settings that fill no more of the grid of their values are shown as points


@dataclass(frozen=True)
class Picture:
    """A figure with its words; `name` is the id of its element."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def pictures(results: Results) -> list[Picture]:
    """Those for which there is something to show."""
    found = [_over_axes(results), *_curves(results), _parallel_coordinates(results)]
    return [picture for picture in found if picture is not None]


# ---------------------------------------------------------------------- the metric over the axes


def _over_axes(results: Results) -> Picture | None:
    if results.best is None or not results.axes:
        return None
    if len(results.axes) == 1:
        return _over_one_axis(results)
    x, y, *others = results.axes
    best = results.best
    values = [distinct(results.settings, axis) for axis in results.axes]
    if len(results.settings) <= SHARE_OF_GRID * math.prod(len(column) for column in values):
        return _as_points(results, x, y, others)
    return _heat_map(results, best, x, y, others)


def _over_one_axis(results: Results) -> Picture:
    (axis,) = results.axes
    ranked = [setting for setting in results.settings if setting.over_seeds(results.metric)]
    spreads = [spread for setting in ranked if (spread := setting.over_seeds(results.metric))]
    scale = axis_type([setting.values.get(axis) for setting in results.settings])
    rows = [row for setting in ranked for row in setting.rows if row.finished and results.metric in row.last]
    figure = _figure(
        go.Scatter(
            x=[_place(row.trial.settings.get(axis), scale) for row in rows],
            y=[_or_none(row.last[results.metric]) for row in rows],
            text=[f"{row.trial.id}, seed {row.trial.seed}" for row in rows],
            mode="markers",
            name="trial",
            marker={"color": "#5ec962", "size": 7},
        ),
        go.Scatter(
            x=[_place(setting.values.get(axis), scale) for setting in ranked],
            y=[spread.mean for spread in spreads],
            error_y={"type": "data", "array": [spread.deviation or 0.0 for spread in spreads]},
            mode="lines+markers" if all(is_number(setting.values.get(axis)) for setting in ranked) else "markers",
            name="mean ± standard deviation",
            line={"color": "#3b528b"},
            marker={"color": "#3b528b", "size": 9},
        ),
    )
    figure.update_xaxes(**_axis(results, axis, scale))
    figure.update_yaxes(title=with_unit(results.metric))
    caption = "Last value of each finished trial; mean and standard deviation over seeds."
    return Picture("over_axes", f"{results.metric} over {axis}", caption, figure)


def _heat_map(results: Results, best: Setting, x: str, y: str, others: Sequence[str]) -> Picture:
    """Of the first two axes; the others stay as the best setting has them."""
    shown = [s for s in results.settings if all(s.values.get(axis) == best.values.get(axis) for axis in others)]
    columns, rows = distinct(shown, x), distinct(shown, y)
    spreads = {(label(s.values.get(x)), label(s.values.get(y))): s.over_seeds(results.metric) for s in shown}
    cells = [[spreads.get((column, row)) for column in columns] for row in rows]
    figure = _figure(
        go.Heatmap(
            x=columns,
            y=rows,
            z=[[cell.mean if cell else None for cell in line] for line in cells],
            text=[[f"{cell}<br>n = {cell.n}" if cell else "" for cell in line] for line in cells],
            texttemplate="%{text}",
            colorscale=_scale(results),
            colorbar={"title": with_unit(results.metric)},
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title=x, type="category", showgrid=False)
    figure.update_yaxes(title=y, type="category", showgrid=False)
    fixed = ", ".join(f"{axis}={words(best.values.get(axis))}" for axis in others)
    at_best = f" The other axes are fixed where the best setting has them: {fixed}." if others else ""
    caption = f"Mean ± standard deviation over seeds; empty: no finished trial.{at_best}"
    return Picture("over_axes", f"{results.metric} over {x} and {y}", caption, figure)


def _as_points(results: Results, x: str, y: str, others: Sequence[str]) -> Picture:
    """Where settings are no grid: drawn at random, found by a search, or axes that change together."""
    ranked = results.rankings[results.metric]
    spreads = [spread for setting in ranked if (spread := setting.over_seeds(results.metric))]
    scales = [axis_type([setting.values.get(axis) for setting in results.settings]) for axis in (x, y)]
    places = [[_place(s.values.get(axis), scale) for s in ranked] for axis, scale in zip((x, y), scales, strict=True)]
    marker = {
        "color": [spread.mean for spread in spreads],
        "colorscale": _scale(results),
        "colorbar": {"title": with_unit(results.metric)},
        "size": 12,
        "line": {"color": "#333333", "width": 1},
    }
    texts = [f"{label(setting)}<br>{spread}" for setting, spread in zip(ranked, spreads, strict=True)]
    figure = _figure(go.Scatter(x=places[0], y=places[1], text=texts, mode="markers", marker=marker))
    figure.update_xaxes(**_axis(results, x, scales[0]))
    figure.update_yaxes(**_axis(results, y, scales[1]))
    along = f" {', '.join(others)} differ from point to point." if others else ""
    caption = f"One point a setting, coloured by its mean over seeds.{along}"
    return Picture("over_axes", f"{results.metric} over {x} and {y}", caption, figure)


# ---------------------------------------------------------------------- over steps


def _curves(results: Results) -> list[Picture]:
    names = dict.fromkeys((LOSS, results.metric, EFFECTIVE_RANK))
    return [_curve(results, name) for name in names if any(row.curves[name] for row in results.rows)]


def _curve(results: Results, metric: str) -> Picture:
    """One line a trial; seeds of a setting have its colour."""
    # Up to 0.9: the yellow end is hard to see on white.
    shares = [0.9 * place / max(1, len(results.settings) - 1) for place in range(len(results.settings))]
    colours = sample_colorscale("viridis", shares)
    lines = []
    for setting, colour in zip(results.settings, colours, strict=True):
        drawn = [row for row in setting.rows if row.curves[metric]]
        for position, row in enumerate(drawn):
            points = thinned(row.curves[metric])
            lines.append(
                go.Scatter(
                    x=[step for step, _ in points],
                    y=[_or_none(value) for _, value in points],
                    mode="lines+markers" if len(points) < 20 else "lines",
                    name=label(setting),
                    legendgroup=str(setting),
                    showlegend=position == 0,
                    text=[f"{row.trial.id}, seed {row.trial.seed}"] * len(points),
                    line={"color": colour, "width": 1.5, "dash": "solid" if row.finished else "dot"},
                )
            )
    figure = _figure(*lines)
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title=with_unit(metric))
    longest = max(len(row.curves[metric]) for row in results.rows)
    thin = f" Every {thinning(longest)}th logged value of the longest curve is drawn." if longest > MAX_POINTS else ""
    caption = f"One curve a trial, dotted where it has not finished; a click on a name hides its setting.{thin}"
    return Picture(f"curve_{metric.replace('/', '_')}", f"{metric} of all trials", caption, figure)


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MAX_POINTS` of them, the last one among them."""
    stride = thinning(len(points))
    return list(points[::-stride][::-1])


def thinning(count: int) -> int:
    return -(-count // MAX_POINTS)


# ---------------------------------------------------------------------- parallel coordinates


def _parallel_coordinates(results: Results) -> Picture | None:
    """A line a trial, from value to value; plotly's own needs WebGL."""
    metrics = dict.fromkeys((results.metric, EFFECTIVE_RANK))
    rows = [row for row in results.rows if row.finished and math.isfinite(row.last.get(results.metric, math.nan))]
    names = [*results.axes, *(name for name in metrics if not all(_is_nan(_value(row, name)) for row in rows))]
    if not rows or not results.axes:
        return None
    columns = [_column(results, name, [_value(row, name) for row in rows]) for name in names]
    values = [row.last[results.metric] for row in rows]
    low, high = min(values), max(values)
    shares = [(value - low) / (high - low) if high > low else 0.5 for value in values]
    figure = _figure()
    for row, colour in zip(rows, sample_colorscale(_scale(results), shares), strict=True):
        heights = [column.height(_value(row, column.name)) for column in columns]
        texts = [f"{row.trial.id}<br>{column.name}: {label(_value(row, column.name))}" for column in columns]
        line = {"color": colour, "width": 2}
        figure.add_scatter(x=list(range(len(columns))), y=heights, text=texts, mode="lines+markers", line=line)
    bar = {"color": [low, high], "colorscale": _scale(results), "colorbar": {"title": with_unit(results.metric)}}
    figure.add_scatter(x=[None, None], y=[None, None], mode="markers", marker=bar)
    for place, column in enumerate(columns):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": "#888888", "width": 1})
        for word, height in column.ticks:
            tick = {"text": word, "showarrow": False, "xanchor": "right", "xshift": -6, "bgcolor": "white"}
            figure.add_annotation(x=place, y=height, **tick)
    figure.update_traces(showlegend=False, hovertemplate="%{text}<extra></extra>")
    titles = [name if name in results.axes else with_unit(name) for name in names]
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=titles, range=[-0.4, len(names) - 0.8])
    figure.update_xaxes(showgrid=False, side="top")
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    figure.update_layout(margin={"t": 70, "b": 10})
    caption = "One line a finished trial, coloured by the metric."
    return Picture("parallel_coordinates", "Parallel coordinates", caption, figure)


@dataclass(frozen=True)
class _Column:
    """An upright axis from 0 to 1: linear or logarithmic in numbers, evenly spaced in names."""

    name: str
    scale: str
    values: list[Any]  # distinct, ordered

    def height(self, value: Any) -> float | None:
        if _is_nan(value):
            return None
        first, last, here = (self._coordinate(each) for each in (self.values[0], self.values[-1], value))
        return (here - first) / (last - first) if last > first else 0.5

    def _coordinate(self, value: Any) -> float:
        if self.scale == "category":
            return [show(each) for each in self.values].index(show(value))
        return math.log(value) if self.scale == "log" else float(value)

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """Each of the names, or both ends."""
        shown = self.values if self.scale == "category" else {self.values[0], self.values[-1]}
        heights = [(value, self.height(value)) for value in shown]
        return [(label(value), height) for value, height in heights if height is not None]


def _column(results: Results, name: str, values: Sequence[Any]) -> _Column:
    unique = {show(value): value for value in values if not _is_nan(value)}
    scale = axis_type(list(unique.values())) if name in results.axes else "linear"
    return _Column(name, scale, sorted(unique.values(), key=order))


# ---------------------------------------------------------------------- shared


def distinct(settings: Sequence[Setting], axis: str) -> list[str]:
    """The values of an axis as shown, in order."""
    return list(dict.fromkeys(label(value) for value in sorted((s.values.get(axis) for s in settings), key=order)))


def axis_type(values: Sequence[Any]) -> str:
    """plotly's name: `category` for names and few values, `log` for numbers over orders of magnitude, `linear`."""
    if len({show(value) for value in values}) <= MAX_CATEGORIES or not all(is_number(value) for value in values):
        return "category"
    return "log" if min(values) > 0 and max(values) / min(values) >= LOG_FROM else "linear"


def _axis(results: Results, name: str, scale: str) -> dict[str, Any]:
    """Settings of a plotly axis; categories in the order of their values."""
    if scale != "category":
        return {"title": name, "type": scale}
    values = distinct(results.settings, name)
    return {"title": name, "type": scale, "categoryorder": "array", "categoryarray": values}


def label(value: Any) -> str:
    """As shown in a figure, whose texts are read as HTML."""
    return html.escape(words(value), quote=False)


def _place(value: Any, scale: str) -> Any:
    return label(value) if scale == "category" else value


def _value(row: Row, name: str) -> Any:
    return row.trial.settings[name] if name in row.trial.settings else row.last.get(name, math.nan)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scale(results: Results) -> str:
    """Bright is better."""
    return "viridis" if results.maximize else "viridis_r"


def _figure(*traces: Any) -> go.Figure:
    """Plain and light; the grid stays behind the data."""
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="simple_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
        height=440,
    )
    figure.update_xaxes(automargin=True, showgrid=True, gridcolor="#eeeeee")
    figure.update_yaxes(automargin=True, showgrid=True, gridcolor="#eeeeee")
    return figure
