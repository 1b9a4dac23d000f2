"""Overrides as typed on a command line: which of them cannot be used, in one sentence each."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError

from dino import config as configuration
from dino.config import hydra_compose
from dino.messages import did_you_mean, nearest_first, show
from dino.presets import leaves

MAY_BE_LEFT_OUT = ("evaluation", "logger", "experiment", "debug", "sweep", "cluster")


def compose_or_explain(overrides: Sequence[str]) -> tuple[DictConfig | None, list[str]]:
    """The config (with Hydra's node) of all overrides that can be used, and a sentence for each that cannot.

    Without a config there is nothing to go on with, such as a file of conf/ that is not YAML.
    """
    usable, problems = _usable(overrides)
    while True:
        try:
            return hydra_compose([override.input_line or "" for override in usable]), problems
        except Exception as error:  # Hydra's errors have no common base: YAML, OmegaConf and plain ValueErrors too
            culprit, sentence = _explain(error, usable)
            problems.append(sentence)
            if culprit is None:
                return None, problems
            usable.remove(culprit)


def options_of(group: str) -> list[str]:
    """The options of a config group, such as `loss/centering`; empty if there is no such group."""
    return sorted(path.stem for path in (configuration.CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(
        {path.parent.relative_to(configuration.CONF).as_posix() for path in configuration.CONF.rglob("*/*.yaml")}
    )


def option_problem(group: str, option: Any) -> str:
    options = nearest_first(show(option), options_of(group))
    return f"{group}={show(option)}: no such option; there are {', '.join(options)}"


# ---------------------------------------------------------------------- before composing


def parsed(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The words that can be read as overrides, and a sentence for each that cannot."""
    parser = OverridesParser.create()
    lines, spaced = _without_spaced(list(words))
    problems = [f"{' '.join(three)}: write {''.join(three)}, without spaces around the =" for three in spaced]
    readable = []
    for line in lines:
        try:
            override = parser.parse_override(line)
        except HydraException:
            problems.append(_unreadable(line))
            continue
        if override.key_or_group:
            readable.append(override)
        else:
            problems.append(_unreadable(line))
    return readable, problems


def _usable(words: Sequence[str]) -> tuple[list[Override], list[str]]:
    readable, problems = parsed(words)
    usable = []
    for override in readable:
        problem = _problem(override, override.input_line or "")
        if problem:
            problems.append(problem)
        else:
            usable.append(override)
    return usable, problems


def _without_spaced(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """`key = value` arrives as three words; they are taken out."""
    spaced = []
    while "=" in words:
        at = words.index("=")
        first, last = max(0, at - 1), at + 2
        spaced.append(words[first:last])
        words = words[:first] + words[last:]
    return words, spaced


def _unreadable(line: str) -> str:
    key, equals, value = line.partition("=")
    if not equals:
        return f"{line}: write a setting as key=value, such as trainer.epochs=20"
    if not key.strip("+~ "):
        return f"{line}: there is no key before the =; write key=value, such as trainer.epochs=20"
    if key != key.strip() or not re.fullmatch(r"[+~]{0,2}[\w@./:-]+", key):
        return f"{line}: {key!r} cannot be a key; write key=value, such as trainer.epochs=20"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"{line}: the value cannot be read as it stands; quote it, twice because of the shell: '{key}=\"{quoted}\"'"


def _problem(override: Override, line: str) -> str | None:
    if override.is_hydra_override():
        return None
    group = override.key_or_group
    options = options_of(group)
    if override.is_sweep_override():
        as_list = f"{group}=[{line.partition('=')[2]}]"
        return f"{line}: several values; add -m to run one after another, or write '{as_list}' for a list"
    if not options:
        if (configuration.CONF / group).is_dir() or group in _parents_of_groups():
            nested = [name for name in groups() if name.startswith(f"{group}/")]
            return f"{line}: {group} has no options of its own; choose {' or '.join(nested)}"
        as_group = group.replace(".", "/")
        if (configuration.CONF / as_group).is_dir() and not isinstance(override.value(), dict):
            there = " or ".join(f"{as_group}={option}" for option in options_of(as_group))
            return f"{line}: {group} is a group of settings; set one of its keys, or choose {there}"
        return None
    value = override.value()
    if override.is_delete() or isinstance(value, dict):
        return None
    if value is None:
        leave_out = f"; to leave the group out write ~{group}" if group in MAY_BE_LEFT_OUT else ""
        return option_problem(group, None) + leave_out
    for option in value if isinstance(value, list) else [value]:
        if not isinstance(option, str) or option not in options:
            return option_problem(group, option)
    if override.is_add() or override.is_force_add():
        return f"{line}: {group} is chosen already; write {line.lstrip('+')} without the +"
    return None


def _parents_of_groups() -> set[str]:
    return {name.split("/")[0] for name in groups()}


# ---------------------------------------------------------------------- when composing failed


def _explain(error: Exception, usable: Sequence[Override]) -> tuple[Override | None, str]:
    """The override to blame (None if it is not one of them) and a sentence."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        culprit = next((o for o in usable if o.key_or_group == group), None)
        if group and options_of(group):
            because = "" if culprit else f" (chosen by {_parent_file(text)})"
            return culprit, option_problem(group, option) + because
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return None, f"{mark.name}, line {mark.line + 1}: {error.problem or _one_sentence(text)}"
    if isinstance(error, UnicodeDecodeError):
        return None, f"{_not_text()}: it is not text in UTF-8; save it as that"
    if inside := re.match(r"In '([^']+)': (.*)", text, re.DOTALL):
        return None, f"conf/{inside[1]}.yaml: {_one_sentence(inside[2])}"
    culprit = _named_in(text, usable)
    if culprit is None:
        return None, _one_sentence(text if isinstance(error, HydraException) else f"{type(error).__name__}: {text}")
    key, line = culprit.key_or_group, culprit.input_line or ""
    if "already at" in text:
        return culprit, f"{line}: {key} is there already; write {line.lstrip('+')} without the +"
    if culprit.is_delete():
        return culprit, f"{line}: there is no {key} to leave out{did_you_mean(key, _known_keys(usable))}"
    if "Could not override" in text or "looks like a config group" in text or "not in struct" in text:
        return culprit, unknown_key(key, usable)
    return culprit, f"{line}: {_one_sentence(str(error.__cause__ or text))}"


def _not_text() -> str:
    """The files of conf/ that hold other bytes than text, one of which was chosen."""
    found = []
    for path in sorted(configuration.CONF.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            found.append(str(path))
    return ", ".join(found) or str(configuration.CONF)


def unknown_key(key: str, usable: Sequence[Override] = ()) -> str:
    """The sentence for a key that does not exist."""
    if "/" in key:
        return f"{key}: there is no such group{did_you_mean(key, groups())}"
    # A key of a group that has it only with another option: `backbone.patch_size` with a convolutional network.
    known = [*_known_keys(usable), *(name for name in groups() if "/" not in name)]
    return f"{key}: there is no such key{did_you_mean(key, known)}"


def _named_in(text: str, usable: Sequence[Override]) -> Override | None:
    for override in usable:
        if override.input_line and override.input_line in text:
            return override
    return next((o for o in usable if f"'{o.key_or_group}'" in text), None)


def _known_keys(usable: Sequence[Override]) -> list[str]:
    """All keys that these choices of groups have (of the defaults where even they do not compose)."""
    choices = [override.input_line or "" for override in usable if options_of(override.key_or_group)]
    for lines in (choices, []):
        try:
            config = hydra_compose(lines)
        except Exception:
            continue
        settings = OmegaConf.to_container(config, resolve=False)
        assert isinstance(settings, dict)
        hydra = leaves({"hydra": settings.pop("hydra")})
        own = leaves({str(key): value for key, value in settings.items()})
        return [*own, *hydra] if any(o.is_hydra_override() for o in usable) else list(own)
    return []


def _parent_file(text: str) -> str:
    match = re.match(r"In '([^']+)'", text)
    return f"conf/{match[1]}.yaml" if match else "another file of conf/"


def _one_sentence(text: str) -> str:
    """Hydra's and OmegaConf's messages have several lines; the first says what is wrong."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0] if lines else "it cannot be composed"
