"""The probabilities of teacher and student over the prototypes, as evaluations have recorded them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino.analysis.charts import COLOURS, Chart, Curve, Dash, Drawing
from dino.analysis.history import History

NUM_SHOWN_STEPS = 4  # at which distributions and pictures are shown
WHOSE: dict[str, Dash] = {"teacher": "solid", "student": "dash"}


def distributions(history: History, mark: str = "") -> list[Drawing]:
    """At a few steps, a colour a step; `mark` ends the names of the elements."""
    files = chosen(sorted(history.directory.glob("pictures/step_*/distributions.json")))
    found = [(int(path.parent.name.removeprefix("step_")), content) for path in files if (content := _content(path))]
    kinds = [
        ("entropy", "Entropy of an image's distribution", "nats, up to ln K", "share of images"),
        ("max_probability", "Largest probability", "probability", "share of images"),
        ("concentration", "Mass of the largest probabilities", "number of prototypes", "mass"),
    ]
    drawings: list[Drawing] = []
    for kind, title, x, y in kinds:
        curves = [
            Curve(label=f"{who}, step {step}", x=points[0], y=points[1], colour=COLOURS[index], dash=dash)
            for index, (step, content) in enumerate(found)
            for who, dash in WHOSE.items()
            if (points := _distribution(content, who, kind)) is not None
        ]
        if curves:
            name = f"distribution_{kind}{mark}"
            caption = "Solid: teacher, dashed: student."
            log_x = kind == "concentration"
            drawings.append(Chart(name=name, title=title, caption=caption, x=x, y=y, curves=curves, log_x=log_x))
    return drawings


def chosen(paths: Sequence[Path]) -> list[Path]:
    """The first, the last, and evenly many between."""
    places = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), NUM_SHOWN_STEPS)).round().astype(int))
    return [paths[place] for place in places]


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _distribution(content: dict[str, Any], who: str, kind: str) -> tuple[list[float], list[float]] | None:
    """Points to draw; None where the file does not have them."""
    try:
        part = content[who][kind]
        if kind == "concentration":
            return list(map(float, part["rank"])), list(map(float, part["mass"]))
        edges, counts = np.array(part["edges"], float), np.array(part["counts"], float)
        return ((edges[1:] + edges[:-1]) / 2).tolist(), (counts / max(counts.sum(), 1)).tolist()
    except (KeyError, TypeError, ValueError):
        return None
