"""What a run's settings differ in from where they come from, and from those of other runs."""

from collections.abc import Mapping, Sequence

from dino.analysis.history import History
from dino.config import compose, differences, resolve
from dino.messages import ConfigError, as_override
from dino.presets import leaves

ORIGINS = ("experiment", "dataset", "recipe", "debug")  # the choices that a run starts from
PLACES = ("run_dir", "resume", "dataset.root")  # say where, not what


def changes(history: History) -> tuple[str, list[str]]:
    """The command that has the settings from which this run started, and `key: there -> here` for each difference.

    Raises:
        ValueError: that cannot be said, with the reason.
    """
    if not history.settings:
        raise ValueError("config.yaml is missing or damaged")
    words = [word for word in history.overrides if word.lstrip("+").partition("=")[0] in ORIGINS]
    dataset = history.settings.get("dataset.name")
    if not words and dataset:
        words = [f"dataset={dataset}"]
    root = history.settings.get("dataset.root")
    try:
        origin = leaves(resolve(compose([*words, *([as_override("dataset.root", root)] if root else [])])))
    except ConfigError as error:
        raise ValueError(f"its origin cannot be composed today: {error.problems[0]}") from error
    here = {key: value for key, value in history.settings.items() if key not in PLACES}
    there = {key: value for key, value in origin.items() if key not in PLACES}
    return " ".join(["python train.py", *words]), differences(there, here)


def differing(settings: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Key -> value of each run, for the settings in which runs differ."""
    keys = dict.fromkeys(key for each in settings for key in each if key not in PLACES)
    values = {key: [each.get(key) for each in settings] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}
