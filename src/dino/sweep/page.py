"""`sweep.html`: all of a sweep on one page, in one file that needs nothing else, offline too."""

import html
import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from dino.messages import show
from dino.pages import details, document, figure, section, table
from dino.sweep.collect import EFFECTIVE_RANK, LOSS, Results, Row, Setting, number, with_unit, words
from dino.sweep.figures import Picture, pictures


def page(results: Results) -> str:
    """The whole file. Whatever comes from settings, reasons or logs is escaped."""
    figures = "".join(_figure(picture) for picture in pictures(results))
    body = [
        f"<h1>Sweep {html.escape(results.manifest.name)}</h1>",
        f"<p>{html.escape(results.summary)}</p>",
        section("Best", _best(results)),
        section("Settings", _settings(results)),
        section("Figures", figures or "<p>There is nothing to draw yet.</p>"),
        section("Rankings", _rankings(results)),
        section("Trials", _trials(results)),
        section("Configuration", _configuration(results)),
        section("Provenance", _provenance(results)),
    ]
    return document(f"Sweep {results.manifest.name}", body)


def _figure(picture: Picture) -> str:
    return figure(picture.name, picture.title, picture.caption, json.loads(picture.figure.to_json()))


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
    return f"<p>{note}</p>{table([*results.axes, 'seeds', *map(with_unit, results.averaged)], lines)}"


def _trials(results: Results) -> str:
    metrics = [name for name in dict.fromkeys((results.metric, EFFECTIVE_RANK, LOSS)) if name in results.metrics]
    header = ["trial", "state", "reason", *results.axes, "seed", "step", *map(with_unit, metrics)]
    header += [f"best {results.metric}", "images/s", "restarts", "host", "job"]
    return table(header, [_trial(results, row, metrics) for row in results.rows])


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
    return f"<p>{html.escape(note)}</p>{table(['place', *names], lines)}"


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
    return "".join(details(title, text) for title, text in parts)


def _provenance(results: Results) -> str:
    manifest = results.manifest
    snapshots = table(
        ["snapshot", "commit", "SHA-256", "copied from"],
        [[snapshot.folder, snapshot.commit, snapshot.digest, snapshot.source] for snapshot in manifest.snapshots],
    )
    command = html.escape(f"cd {shlex.quote(manifest.cwd)}\n{shlex.join(manifest.command)}")
    return f"<pre>{command}</pre>{snapshots}"


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False))
