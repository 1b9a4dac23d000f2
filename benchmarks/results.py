"""Results as JSON, one file a benchmark in a folder for each device, and one page made from all of them."""

import json
from pathlib import Path
from typing import Any

from benchmarks.plots import plot
from benchmarks.summary import PLACES

FOLDER = Path(__file__).parent / "results"
SETTINGS_SHOWN = ("gflop_per_image", "products_gflop_per_s", "student_logits_mib")


def save(name: str, about: str, measured: list[dict[str, Any]], machine: dict[str, Any], folder: Path) -> Path:
    """Writes `folder/NAME.json`: comparisons and tables, with what they are bound to."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"name": name, "about": about, "machine": machine, "results": measured}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_page(folder: Path) -> Path:
    """`folder/README.md` and the plots, from every result below `folder`, if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Results",
        "",
        "Written by `make bench` from the JSON files beside it. `!` marks figures from too few undisturbed samples;",
        "`times` are medians of ratios taken within rounds, with quartiles. Times are medians of undisturbed samples.",
    ]
    for of_device in sorted(path for path in folder.iterdir() if path.is_dir()):
        results = [json.loads(path.read_text()) for path in sorted(of_device.glob("*.json"))]
        for number, result in enumerate(results):
            if number == 0:
                lines += ["", f"## {result['machine']['device']}"]
            lines += ["", f"### {result['name']}", "", *_bound_to(result["machine"]), "", result["about"]]
            for measured in result["results"]:
                lines += ["", *shown(measured)]
            picture = plot(result["results"], of_device / f"{result['name']}.png")
            if picture is not None:
                lines += ["", f"![{result['name']}]({picture.relative_to(folder)})"]
    page = folder / "README.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _bound_to(machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    host = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return [f"Commit {machine['commit'][:10]}, {machine['date']}; {host}; {versions}."]


def shown(measured: dict[str, Any]) -> list[str]:
    if "rows" in measured:
        return [f"**{measured['name']}**", "", *markdown(measured["columns"], measured["rows"])]
    return [f"**{measured['name']}**{_facts(measured['facts'])}", "", *markdown(*table(measured)), *_left_out(measured)]


def table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a comparison: a rate or a time, ratios to the references, memory."""
    per_second = comparison["unit"] != "s"
    references, memory = comparison["references"], comparison["memory"]
    shares = any("of products" in figures for figures in comparison["contenders"].values())
    columns = ["", comparison["unit"] if per_second else "time", "quartiles"]
    columns += [f"times {reference}" for reference in references]
    by_cores = [name for name in references if _has_places(comparison["contenders"], name)]
    columns += [f"times {reference}, cores {place}" for reference in by_cores for place in PLACES]
    columns += [{"process": "peak memory", "extra": "extra memory"}[memory]] if memory != "none" else []
    columns += ["of products"] if shares else []
    columns += ["undisturbed"]
    rows = []
    for name, figures in comparison["contenders"].items():
        seconds = figures["seconds"]
        if per_second:
            middle, *ends = (comparison["per"] / seconds[key] for key in ("median", "high", "low"))
            row = [name, f"{middle:.3g}", f"{ends[0]:.3g} to {ends[1]:.3g}"]
        else:
            row = [name, duration(seconds["median"]), f"{duration(seconds['low'])} to {duration(seconds['high'])}"]
        row += [_times(figures["times_faster"][reference]) for reference in references]
        for reference in by_cores:
            times = figures.get("times_faster_by_cores", {}).get(reference)
            row += [_times(times[place]) if times else "" for place in PLACES]
        row += [f"{figures['memory_mib'][memory]:,.0f} MiB"] if memory != "none" else []
        row += [f"{figures['of products']:.0%}"] if shares else []
        row += [f"{figures['num_clean']} of {figures['num_samples']}{' !' if figures['noisy'] else ''}"]
        rows.append(row)
    return columns, rows


def _has_places(contenders: dict[str, dict[str, Any]], reference: str) -> bool:
    """Whether all others were compared with it both with the cores near and far."""
    others = [figures for name, figures in contenders.items() if name != reference]
    return bool(others) and all(reference in figures.get("times_faster_by_cores", {}) for figures in others)


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def _facts(facts: dict[str, Any]) -> str:
    shown = {name.replace("_", " "): facts[name] for name in SETTINGS_SHOWN if name in facts}
    return "".join(f"; {name}: {_plain(value)}" for name, value in shown.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _left_out(comparison: dict[str, Any]) -> list[str]:
    return ["", *[f"Without {name}: {reason}" for name, reason in comparison["left_out"].items()]]
