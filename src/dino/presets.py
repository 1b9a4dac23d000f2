"""Settings of recipes and debug presets apply where the chosen options have them.

`recipe=digits` sets `schedule.lr.warmup_epochs`, which `schedule/lr=three_phase` does not have: the setting is dropped
with that option. What a person typed or an experiment sets is never dropped; there, such a key is an error.
"""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

PRESETS = ("recipe", "debug")


def leaves(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists and empty dictionaries count as values."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@cache
def keys_of_option(conf: Path, group: str, option: str) -> frozenset[str]:
    """The keys in an option's file and in the files of its group that it builds on; none for an unknown option."""
    path = conf / group / f"{option}.yaml"
    if not path.is_file():
        return frozenset()
    settings = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(settings, dict)
    bases = settings.pop("defaults", [])
    keys = set(leaves(settings))
    for base in bases:
        if isinstance(base, str) and base != "_self_":
            keys |= keys_of_option(conf, group, base)
    return frozenset(keys)


def keys_by_hand(conf: Path, hydra: DictConfig) -> frozenset[str]:
    """The keys that a person set: typed, or written into the chosen experiment. `hydra` is Hydra's node."""
    lines = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(lines, list)
    typed = {str(line).lstrip("+~").partition("=")[0] for line in lines}
    return frozenset(typed | keys_of_option(conf, "experiment", str(hydra.runtime.choices.get("experiment"))))


def fit_presets(config: DictConfig, conf: Path, hydra: DictConfig) -> None:
    """Takes out of `config` what a recipe or debug preset set and the chosen options do not have."""
    choices = hydra.runtime.choices
    preset = {key for group in PRESETS for key in keys_of_option(conf, group, str(choices.get(group)))}
    for key in sorted(preset - keys_by_hand(conf, hydra)):
        if not _offered(key, config, conf, choices):
            _remove(key, config)


def _offered(key: str, config: DictConfig, conf: Path, choices: DictConfig) -> bool:
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        group, rest = "/".join(parts[:cut]), ".".join(parts[cut:])
        if group in ("evaluation", "logger"):  # several options at once, each under its own name
            return OmegaConf.select(config, f"{group}.{parts[cut]}._target_") is not None
        if group in choices:
            return rest in keys_of_option(conf, group, str(choices[group]))
    return True


def _remove(key: str, config: DictConfig) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent)
    if isinstance(node, DictConfig) and name in node:
        with open_dict(config):
            del node[name]
        if not node and parent.count("."):
            _remove(parent, config)
