"""Pictures of comparisons: bars of one, lines of a family of them."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"baseline": "#8c8c8c", "lightly": "#d98b2b", "ours": "#2b6cb0"}


def plot(results: list[dict[str, Any]], path: Path) -> Path | None:
    """Writes a PNG of those results that are comparisons or curves; None where there are none."""
    families: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "contenders" in result or "curves" in result:
            families.setdefault(result.get("facts", {}).get("axis", result["name"]), []).append(result)
    if not families:
        return None
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False)
    for axis, (title, family) in zip(axes.flat, families.items(), strict=False):
        if "curves" in family[0]:
            _curves(axis, family[0])
        elif "axis" in family[0]["facts"]:
            _lines(axis, title, family)
        else:
            _bars(axis, family[0])
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _bars(axis: Any, comparison: dict[str, Any]) -> None:
    names = list(comparison["contenders"])
    per_second = comparison["unit"] != "s"
    seconds = [comparison["contenders"][name]["seconds"]["median"] for name in names]
    values = [comparison["per"] / value if per_second else value * 1e3 for value in seconds]
    axis.barh(names, values, color=[_colour(name) for name in names])
    axis.bar_label(axis.containers[0], [f" {value:.3g}" for value in values], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(comparison["name"], fontsize=9)
    axis.set_xlabel(comparison["unit"] if per_second else "ms", fontsize=8)
    axis.tick_params(labelsize=8)


def _lines(axis: Any, title: str, family: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(name for comparison in family for name in comparison["contenders"]):
        points = [
            (comparison["facts"]["value"], comparison["per"] / comparison["contenders"][name]["seconds"]["median"])
            for comparison in family
            if name in comparison["contenders"]
        ]
        axis.plot(*zip(*points, strict=True), "o-", label=name, color=_colour(name))
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(family[0]["unit"], fontsize=8)
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)


def _curves(axis: Any, result: dict[str, Any]) -> None:
    for number, (name, curve) in enumerate(result["curves"].items()):
        axis.plot(*zip(*curve, strict=True), "o-", label=name, color=_colour(name), alpha=1 / (1 + number // 2))
    axis.set_title(result["name"], fontsize=9)
    axis.set_xlabel("seconds of training", fontsize=8)
    axis.set_ylabel("k-NN top-1 [%]", fontsize=8)
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)


def _colour(name: str) -> str:
    return next((colour for prefix, colour in COLOURS.items() if name.startswith(prefix)), "#4a4a4a")
