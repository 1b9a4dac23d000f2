"""`report.html`: all there is to say about one or several runs, on one page that needs nothing else."""

import contextlib
import html
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from dino.analysis import figures
from dino.analysis.analyzer import Analysis, analyse
from dino.analysis.charts import Drawing
from dino.analysis.classes import classes_of, newest_classes, worst_classes
from dino.analysis.distributions import chosen, distributions
from dino.analysis.history import History, labels
from dino.analysis.images import all_embedded
from dino.analysis.origin import changes, differing
from dino.analysis.plotly_figures import figure_of
from dino.messages import show
from dino.pages import details, document, figure, paragraph, section, table

log = logging.getLogger("dino")

MAX_BYTES = 4_900_000  # of the whole page
PICTURES_BYTES = 1_800_000  # of its pictures, where there is room
PICTURES = {"attention.png": "Attention of the teacher", "neighbours.png": "Nearest neighbours"}
NOT_PROVENANCE = ("state", "step", "reason", "exit_code", "total_steps")

Part = Callable[[Analysis], str]


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page and, into `plots/` of each run, its pictures; returns where the page is.

    Args:
        output: None: `report.html` of the first run.

    Raises:
        ValueError: one of them is not the directory of a run.
        OSError: there is no room, or no right to write.
    """
    analyses = [analyse(History.load(directory)) for directory in run_dirs]
    return write(analyses, output)


def write(analyses: Sequence[Analysis], output: Path | None = None) -> Path:
    """As `write_report`, for runs that are analysed already."""
    path = output or analyses[0].history.directory / "report.html"
    if path.is_dir():
        path = path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page(analyses))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for analysis in analyses:
        try:
            _write_plots(analysis.history)
        except OSError as error:  # the page has all of it
            log.warning("plots/ of %s cannot be written: %s", analysis.history.directory, error)
    return path


def _write_plots(history: History) -> None:
    drawings = figures.drawings_of(history)
    if not drawings:
        return
    from dino.analysis.png import draw  # matplotlib takes a second to import

    folder = history.directory / "plots"
    folder.mkdir(exist_ok=True)
    for drawing in drawings:
        draw(drawing).savefig(folder / f"{drawing.name}.png")


def page(analyses: Sequence[Analysis]) -> str:
    """The whole file. Whatever comes from settings, events or files is escaped."""
    histories = [analysis.history for analysis in analyses]
    names = labels(histories)
    title = "Report on " + ", ".join(names)
    before = [
        f"<h1>{html.escape(title)}</h1>",
        *(_summary(each, name if len(names) > 1 else None) for each, name in zip(analyses, names, strict=True)),
        *([section("Runs compared", _comparison(analyses, names))] if len(analyses) > 1 else []),
        section("Verdicts", _each(analyses, names, _verdicts)),
        section("Recommendations", _each(analyses, names, _recommendations)),
        section("Does it learn?", _figures(figures.learning(histories))),
        section("Gradients and schedules", _figures(figures.optimisation(histories))),
        section("Speed and memory", _figures(figures.performance(histories))),
        section("Classes", _classes(histories, names)),
        section("Distributions over prototypes", _distributions(histories, names)),
    ]
    after = [
        section("What stands out", _each(analyses, names, _anomalies)),
        section("Numbers", _each(analyses, names, _numbers)),
        section("What moves together", _each(analyses, names, _correlations) + _figures(figures.correlated(histories))),
        section("Settings", _each(analyses, names, _settings)),
        section("Provenance", _each(analyses, names, _provenance)),
    ]
    room = MAX_BYTES - len(document(title, [*before, *after]).encode())
    images = section("Pictures", _pictures(histories, names, max(0, min(PICTURES_BYTES, room))))
    return document(title, [*before, images, *after])


def _each(analyses: Sequence[Analysis], names: Sequence[str], part: Part) -> str:
    """The part of each run, under its name where there are several."""
    if len(analyses) == 1:
        return part(analyses[0])
    return "".join(f"<h3>{html.escape(name)}</h3>{part(each)}" for each, name in zip(analyses, names, strict=True))


# ---------------------------------------------------------------------- words


def _summary(analysis: Analysis, name: str | None) -> str:
    """The answer, the score with what it lost, and the state; a run beside others is named, and compared below."""
    score = "" if analysis.score is None else f" Health score {analysis.score:.2f} of 1."
    kind = {"learns": "good", "not yet known": ""}.get(analysis.learning, "bad")
    named = f"{html.escape(name)}: " if name else ""
    words = html.escape(f": {analysis.because}.{score} {analysis.state}")
    lost = _list([f"-{each.points:.2f}: {each.reason}" for each in analysis.deductions])
    numbers = table(analysis.headline, [analysis.headline.values()]) if analysis.headline and not name else ""
    return f'<p>{named}<strong class="{kind}">{analysis.answer}</strong>{words}</p>{lost}{numbers}'


def _comparison(analyses: Sequence[Analysis], names: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for analysis in analyses for key in analysis.headline))
    lines = [
        [
            name,
            analysis.learning,
            "" if analysis.score is None else f"{analysis.score:.2f}",
            analysis.history.state,
            show(analysis.history.step),
            *(analysis.headline.get(key, "") for key in keys),
        ]
        for analysis, name in zip(analyses, names, strict=True)
    ]
    differ = differing([analysis.history.settings for analysis in analyses])
    settings = (
        table(["setting", *names], [[key, *map(show, values)] for key, values in differ.items()])
        if differ
        else paragraph("All settings are the same.")
    )
    return table(["run", "it", "score", "state", "step", *keys], lines) + "<h3>Settings that differ</h3>" + settings


def _verdicts(analysis: Analysis) -> str:
    if not analysis.verdicts:
        return paragraph("None.")
    rows = [
        [verdict.title, "severe" if verdict.severe else "", verdict.when, verdict.text] for verdict in analysis.verdicts
    ]
    return table(["verdict", "", "when", "evidence and advice"], rows)


def _recommendations(analysis: Analysis) -> str:
    return _list([str(each) for each in analysis.recommendations]) or paragraph("Nothing to change.")


def _anomalies(analysis: Analysis) -> str:
    return _list([_sentence(anomaly.text) for anomaly in analysis.anomalies]) or paragraph("Nothing.")


def _numbers(analysis: Analysis) -> str:
    rows = []
    for each in analysis.statistics:
        numbers = (each.first, each.last, each.mean, each.std, each.min, each.max)
        rows.append([each.name, *(f"{number:.4g}" for number in numbers), each.direction])
    note = "The trend is that of the newest third of the run."
    return paragraph(note) + table(["metric", "first", "last", "mean", "std", "min", "max", "trend"], rows)


def _correlations(analysis: Analysis) -> str:
    rows = [[f"{c.first} ~ {c.second}", f"{c.value:+.2f}", str(c.n), c.text] for c in analysis.correlations]
    header = ["metrics", "rank correlation", "steps", "what it says"]
    return table(header, rows) if rows else paragraph("There are too few logged steps.")


def _settings(analysis: Analysis) -> str:
    history = analysis.history
    try:
        command, lines = changes(history)
        beside = f"<code>{html.escape(command)}</code>"
        changed = f"<p>Differences from {beside}:</p>" if lines else f"<p>The same as {beside}.</p>"
        changed += f"<pre>{html.escape(chr(10).join(lines))}</pre>" if lines else ""
    except ValueError as error:
        changed = paragraph(f"No origin to compare with: {error}.")
    return changed + details("All settings", str(yaml.safe_dump(history.config, sort_keys=False)))


def _provenance(analysis: Analysis) -> str:
    history = analysis.history
    times = [line["time"] for line in history.lines if "time" in line]
    rows = [
        ("directory", str(history.directory.resolve())),
        ("overrides", " ".join(history.overrides) or "none known"),
        ("fingerprint", str(history.config.get("fingerprint", ""))),
        *((key, show(value)) for key, value in history.status.items() if key not in NOT_PROVENANCE),
        *(
            (f"{word} logged", _when(each))
            for word, each in zip(("first", "last"), times[:1] + times[-1:], strict=False)
        ),
    ]
    return table(["", ""], rows)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _when(seconds: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError, TypeError):
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
    return ""


# ---------------------------------------------------------------------- pictures


def _figures(drawings: Sequence[Drawing]) -> str:
    drawn = "".join(figure(each.name, each.title, each.caption, figure_of(each)) for each in drawings)
    return f'<div class="columns">{drawn}</div>' if drawn else paragraph("There is nothing to draw yet.")


def _classes(histories: Sequence[History], names: Sequence[str]) -> str:
    parts = []
    for place, (history, name) in enumerate(zip(histories, names, strict=True)):
        content = newest_classes(history)
        if content is not None:
            drawings = classes_of(history, f"_{place}" if len(histories) > 1 else "")
            title = f"<h3>{html.escape(name)}</h3>" if len(histories) > 1 else ""
            rows = table(["recognised worst", "images", "k-NN"], worst_classes(content))
            parts.append(title + (_figures(drawings) if drawings else "") + rows)
    return "".join(parts) or paragraph("None were recorded.")


def _distributions(histories: Sequence[History], names: Sequence[str]) -> str:
    parts = []
    for place, (history, name) in enumerate(zip(histories, names, strict=True)):
        drawings = distributions(history, f"_{place}" if len(histories) > 1 else "")
        title = f"<h3>{html.escape(name)}</h3>" if len(histories) > 1 else ""
        parts.append(title + _figures(drawings) if drawings else "")
    return "".join(parts) or paragraph("None were recorded.")


def _pictures(histories: Sequence[History], names: Sequence[str], max_bytes: int) -> str:
    """Attention and neighbours at a few steps, two a row, then views."""
    found: list[tuple[Path, str]] = []
    for history, name in zip(histories, names, strict=True):
        prefix = f"{name}: " if len(histories) > 1 else ""
        folder = history.directory / "pictures"
        for file, words in PICTURES.items():
            for path in chosen(sorted(folder.glob(f"step_*/{file}"))):
                step = int(path.parent.name.removeprefix("step_"))
                found.append((path, f"{prefix}{words.lower()}, step {step}"))
        if (folder / "views.png").is_file():
            found.append((folder / "views.png", f"{prefix}what the student sees: views of a few images"))
    images = "".join(all_embedded(found, max_bytes))
    return f'<div class="columns">{images}</div>' if images else paragraph("None were recorded.")
