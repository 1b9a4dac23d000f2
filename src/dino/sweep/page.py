"""`sweep.html`: all of a sweep on one page, in one file that needs nothing else, offline too."""

import html
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from plotly.offline import get_plotlyjs

from dino.messages import show
from dino.sweep.collect import EFFECTIVE_RANK, LOSS, Results, Row, Setting, number, with_unit, words
from dino.sweep.figures import Picture, pictures

# The browser itself refuses whatever would come from elsewhere or go there.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)
BUTTONS = ["toImage", "zoom2d", "pan2d", "autoScale2d"]  # plotly's own choice has one that sends the data to its cloud

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
th, td { white-space: nowrap } td.long { white-space: normal; overflow-wrap: anywhere; min-width: 20em }
th { border-bottom: 1px solid #888 }
.wide { overflow-x: auto }
pre { background: #f6f6f6; padding: 8px 12px; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1.5em 0 } figcaption { color: #555; font-size: 13px }
"""


def page(results: Results) -> str:
    """The whole file. Whatever comes from settings, reasons or logs is escaped."""
    name = html.escape(results.manifest.name)
    figures = "".join(_figure(picture) for picture in pictures(results))
    body = [
        f"<h1>Sweep {name}</h1>",
        f"<p>{html.escape(results.summary)}</p>",
        _section("Best", _best(results)),
        _section("Settings", _settings(results)),
        _section("Figures", figures or "<p>There is nothing to draw yet.</p>"),
        _section("Rankings", _rankings(results)),
        _section("Trials", _trials(results)),
        _section("Configuration", _configuration(results)),
        _section("Provenance", _provenance(results)),
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Sweep {name}</title>",
        f"<style>{STYLE}</style>",
        f"<script>{get_plotlyjs()}</script>",
    ]
    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}\n</section>"


def _figure(picture: Picture) -> str:
    drawn = picture.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=picture.name,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [BUTTONS]},
    )
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    return f"<figure><strong>{title}</strong>{drawn}<figcaption>{caption}</figcaption></figure>"


def _best(results: Results) -> str:
    best, row = results.best, results.best_row
    if best is None or row is None:
        return f"<p>No finished trial has {html.escape(results.metric)} yet.</p>"
    value = f"{with_unit(results.metric)} = {number(row.last[results.metric])}"
    sentence = f"{best}: its best trial is {row.trial.id} (seed {row.trial.seed}), {value}. To run it again:"
    code = ""
    if row.snapshot:
        described = f"{row.snapshot.folder}/ of the sweep, commit {row.snapshot.commit}, SHA-256 {row.snapshot.digest}"
        code = f"<p>with the code of {html.escape(described)}.</p>"
    return f"<p>{html.escape(sentence)}</p><pre>{html.escape(row.command)}</pre>{code}"


def _settings(results: Results) -> str:
    lines = []
    for setting in results.settings:
        planned = len(setting.rows)
        spreads = [setting.over_seeds(name) for name in results.averaged]
        lines.append(
            [
                *(words(setting.values.get(axis)) for axis in results.axes),
                f"{planned - setting.num_missing(results.metric)} of {planned}",
                *("" if spread is None else str(spread) for spread in spreads),
            ]
        )
    note = "Mean ± standard deviation (n - 1) of the last values of the trials that have finished."
    return f"<p>{note}</p>{_table([*results.axes, 'seeds', *map(with_unit, results.averaged)], lines)}"


def _trials(results: Results) -> str:
    metrics = [name for name in dict.fromkeys((results.metric, EFFECTIVE_RANK, LOSS)) if name in results.metrics]
    header = ["trial", "state", "reason", *results.axes, "seed", "step", *map(with_unit, metrics)]
    header += [f"best {results.metric}", "images/s", "restarts", "host", "job"]
    return _table(header, [_trial(results, row, metrics) for row in results.rows])


def _trial(results: Results, row: Row, metrics: Sequence[str]) -> list[str]:
    state = row.state
    best = "" if row.best is None else f"{number(row.best[1])} (step {row.best[0]})"
    steps = [show(count) for count in (state.step, state.total_steps) if count is not None]
    return [
        row.trial.id,
        state.state,
        "\n".join(word for word in (state.reason, state.traceback) if word),
        *(words(row.trial.settings.get(axis)) for axis in results.axes),
        str(row.trial.seed),
        " of ".join(steps),
        *(number(row.last.get(name)) for name in metrics),
        best,
        number(state.images_per_s),
        str(state.restarts),
        state.host or "",
        state.job or "",
    ]


def _rankings(results: Results) -> str:
    if not results.rankings:
        return "<p>No setting has a value yet.</p>"
    names = list(results.rankings)
    longest = max(len(ranked) for ranked in results.rankings.values())
    lines = [
        [str(place + 1), *(_place_in(results.rankings[name], place, name) for name in names)]
        for place in range(longest)
    ]
    note = "With labels by the sweep's metric, without labels by effective rank (higher is better)."
    if results.rank_correlation is not None:
        note += f" Spearman's rank correlation of the two: {results.rank_correlation:.2f}."
    return f"<p>{html.escape(note)}</p>{_table(['place', *names], lines)}"


def _place_in(ranked: Sequence[Setting], place: int, metric: str) -> str:
    return f"{ranked[place]} ({ranked[place].over_seeds(metric)})" if place < len(ranked) else ""


def _configuration(results: Results) -> str:
    manifest = results.manifest
    parts = [
        ("Overrides common to all trials", "\n".join(manifest.base) or "none"),
        ("Sweep", _yaml(manifest.sweep)),
        ("Cluster", _yaml(manifest.cluster)),
    ]
    row = results.best_row or next(iter(results.rows), None)
    path = row.state.directory / "config.yaml" if row else None
    if row and path and path.exists():
        parts.append((f"All settings of {row.trial.id}", path.read_text()))
    return "".join(
        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        for title, text in parts
    )


def _provenance(results: Results) -> str:
    manifest = results.manifest
    table = _table(
        ["snapshot", "commit", "SHA-256", "copied from"],
        [[snapshot.folder, snapshot.commit, snapshot.digest, snapshot.source] for snapshot in manifest.snapshots],
    )
    command = html.escape(f"cd {shlex.quote(manifest.cwd)}\n{shlex.join(manifest.command)}")
    return f"<pre>{command}</pre>{table}"


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False))


def _table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    def row(cells: Iterable[str]) -> str:
        return "<tr>" + "".join(cells) + "</tr>"

    def cell(text: str) -> str:
        kind = ' class="long"' if len(text) > 40 else ""
        return f"<td{kind}>" + html.escape(text).replace("\n", "<br>") + "</td>"

    head = row(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(row(map(cell, cells)) for cells in lines)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
