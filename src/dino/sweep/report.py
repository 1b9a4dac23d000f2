"""The results of a sweep as CSV, JSON, a page, and a table for the terminal."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from dino.messages import show
from dino.run import write_json
from dino.sweep.collect import EFFECTIVE_RANK, Results, Row, Setting, number, words
from dino.sweep.page import page
from dino.sweep.status_table import short

Line = dict[str, Any]


def write(results: Results) -> list[Path]:
    """Writes all files into the sweep's folder, each at once; the same results give the same bytes."""
    folder = results.manifest.folder
    by_trial, by_setting = trial_lines(results), setting_lines(results)
    _write_text(folder / "results.csv", _csv(by_trial))
    _write_text(folder / "results_by_setting.csv", _csv(by_setting))
    write_json(folder / "results.json", _finite(_summary(results, by_trial, by_setting)))
    _write_text(folder / "sweep.html", page(results))
    return [folder / name for name in ("results.csv", "results_by_setting.csv", "results.json", "sweep.html")]


def trial_lines(results: Results) -> list[Line]:
    """One line a trial: what it is, what has become of it, and the last value of each metric."""
    return [_trial_line(results, row) for row in results.rows]


def _trial_line(results: Results, row: Row) -> Line:
    state = row.state
    step, value = row.best or (None, None)
    return {
        "trial": row.trial.id,
        "state": state.state,
        **{axis: row.trial.settings.get(axis) for axis in results.axes},
        "seed": row.trial.seed,
        "step": state.step,
        "total_steps": state.total_steps,
        **{name: row.last.get(name) for name in results.metrics},
        f"{results.metric}_best": value,
        f"{results.metric}_best_step": step,
        "train_time_s": row.train_time_s,
        "restarts": state.restarts,
        "host": state.host,
        "job": state.job,
        "exit_code": state.exit_code,
        "reason": state.reason,
        "traceback": state.traceback,
        "fingerprint": row.trial.fingerprint,
        "commit": row.snapshot.commit if row.snapshot else None,
    }


def setting_lines(results: Results) -> list[Line]:
    """One line a setting: n, mean and standard deviation (ddof = 1) over the seeds that have finished."""
    return [_setting_line(results, setting) for setting in results.settings]


def _setting_line(results: Results, setting: Setting) -> Line:
    line: Line = {axis: setting.values.get(axis) for axis in results.axes}
    line |= {"seeds": len(setting.rows), "missing": setting.num_missing(results.metric)}
    for name in results.averaged:
        spread = setting.over_seeds(name)
        line |= {
            f"{name}_n": spread.n if spread else 0,
            f"{name}_mean": spread.mean if spread else None,
            f"{name}_std": spread.deviation if spread else None,
        }
    return line


def _summary(results: Results, by_trial: list[Line], by_setting: list[Line]) -> Line:
    manifest, best, row = results.manifest, results.best, results.best_row
    return {
        "name": manifest.name,
        "metric": results.metric,
        "direction": manifest.sweep["direction"],
        "states": dict(sorted(results.counts.items())),
        "best": best
        and row
        and {
            "settings": best.values,
            "trial": row.trial.id,
            "command": row.command,
            "snapshot": row.snapshot and asdict(row.snapshot),
        },
        "rankings": {name: [setting.values for setting in ranked] for name, ranked in results.rankings.items()},
        "rank_correlation": results.rank_correlation,
        "settings": by_setting,
        "trials": by_trial,
        "command": manifest.command,
        "cwd": manifest.cwd,
        "snapshots": [asdict(snapshot) for snapshot in manifest.snapshots],
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: null, as in `metrics.jsonl`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(lines: Sequence[Line]) -> str:
    """Numbers with all of their digits; an empty field where there is none, `nan` where it is not finite."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else (), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        listed = {key: show(value) for key, value in line.items() if isinstance(value, list | bool)}
        writer.writerow(line | listed)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------- terminal


def terminal_report(results: Results) -> Group:
    """Summary, settings with the best first, what went wrong, and the command of the best; for 80 columns and more."""
    parts: list[Any] = [Text(results.summary), _settings_table(results)]
    if results.rank_correlation is not None:
        agreement = f"Spearman's rank correlation with {EFFECTIVE_RANK}, which needs no labels"
        parts.append(Text(f"{agreement}: {results.rank_correlation:.2f}"))
    broken = [row for row in results.rows if row.state.reason and not row.finished]
    if broken:
        parts.append(_reasons_table(broken))
    return Group(*parts)


def _settings_table(results: Results) -> Table:
    shown = [name for name in dict.fromkeys((results.metric, EFFECTIVE_RANK)) if name in results.metrics]
    headers = [*(short(axis, results.axes) for axis in results.axes), "seeds", *(name.split("/")[-1] for name in shown)]
    table = Table(*(Column(escape(header), overflow="fold") for header in headers))
    ranked = results.rankings.get(results.metric, [])
    for setting in [*ranked, *(setting for setting in results.settings if setting not in ranked)]:
        cells = [words(setting.values.get(axis)) for axis in results.axes]
        cells.append(f"{len(setting.rows) - setting.num_missing(results.metric)} of {len(setting.rows)}")
        spreads = [setting.over_seeds(name) for name in shown]
        cells += ["" if spread is None else str(spread) for spread in spreads]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _reasons_table(rows: Sequence[Row]) -> Table:
    table = Table("trial", "state", "step", Column("reason", overflow="fold"))
    for row in rows:
        reason = "\n".join(word for word in (row.state.reason, row.state.traceback) if word)
        table.add_row(*(escape(cell) for cell in (row.trial.id, row.state.state, number(row.state.step), reason)))
    return table
