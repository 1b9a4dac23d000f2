"""How bad input is put into words: one sentence a problem, with the key, the value, and what would be right."""

import difflib
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from typing import Any

MAX_SHOWN = 5


class ConfigError(ValueError):
    """The configuration is wrong; `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(item) for item in value)}]"
    return str(value)


def as_override(key: str, value: object) -> str:
    """`key=value` as one would type it in a shell: odd paths are quoted, for the shell and for Hydra."""
    text = str(value)
    return f"{key}={text}" if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else shlex.quote(f"{key}={quoted(text)}")


def quoted(text: str) -> str:
    """A text as Hydra reads it in an override, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def clock_time(seconds: float) -> str:
    """For example 00:02:06, or 1.5 days."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def nearest_first(word: str, options: Iterable[str]) -> list[str]:
    def distance(option: str) -> tuple[bool, float, str]:
        ratio = difflib.SequenceMatcher(None, word.lower(), option.lower()).ratio()
        return not option.startswith(word), -ratio, option

    return sorted(options, key=distance)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`; did you mean x?` for the option nearest to `word`, or nothing where none is near.

    Options may be dotted keys: `lr` finds `optimizer.lr`, and `loss.teacher_tmp` finds `loss.teacher_temp`.
    """
    options = [option for option in options if option != word]
    same_end = [option for option in options if option.split(".")[-1] == word.split(".")[-1]]
    near = nearest_first(word, same_end)[:3] or difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not near:
        last = word.split(".")[-1]
        near = [option for option in options if difflib.get_close_matches(last, [option.split(".")[-1]], cutoff=0.75)]
        near = nearest_first(word, near)[:1]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def report(problems: Sequence[str]) -> str:
    """The problems as printed: the first few, one line each, and how many are left."""
    lines = [f"error: {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"error: ... and {len(problems) - MAX_SHOWN} more")
    return "\n".join(lines)
