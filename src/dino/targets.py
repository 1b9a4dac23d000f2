"""`_target_` nodes of the config: finding what they name, checking their keys against its signature, building it.

A key of a node must be a parameter of the target, or be read by another key through an interpolation
(`loss.center_momentum` feeds `loss.centering.momentum`); the latter is not passed on. Anything else is refused, so a
misspelt key never trains the default.
"""

import collections.abc
import functools
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dino.messages import ConfigError, did_you_mean, show
from dino.signatures import MissingNameError, Parameters, read_parameters

ALLOWED_PREFIXES = ("dino", "torch", "torchvision", "timm")
RESERVED = ("_target_", "_partial_")
ANY_VALUE: Any = object()  # stands for a value that fits every type


@dataclass(frozen=True)
class Policy:
    """What may be built: packages beside our own, and the keys that other keys read."""

    allowed_targets: tuple[str, ...]
    read_keys: frozenset[str]

    def allows(self, name: str) -> bool:
        prefixes = (*ALLOWED_PREFIXES, *(prefix.rstrip(".") for prefix in self.allowed_targets))
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def target_nodes(settings: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All (dotted key, node) with a `_target_`, outer ones first."""
    if isinstance(settings, dict):
        if "_target_" in settings:
            yield key, settings
        for name, value in settings.items():
            yield from target_nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list):
        for index, value in enumerate(settings):
            yield from target_nodes(value, f"{key}[{index}]")


def name_problem(key: str, name: Any, policy: Policy) -> str | None:
    """What is wrong with a target's name, as far as can be said without importing it."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        return f"{key}._target_={show(name)}: write the full name of a class or function, such as dino.loss.DINOLoss"
    if policy.allows(name):
        return None
    allowed = ", ".join(f"{prefix}." for prefix in ALLOWED_PREFIXES)
    return (
        f"{key}._target_={name}: only names in {allowed} are built; "
        f"to allow this one add allowed_targets=[{name.split('.')[0]}]"
    )


def locate(key: str, name: str, policy: Policy) -> Callable[..., Any]:
    """The class or function called `name`.

    Raises:
        ConfigError: with the innermost import error, if it is not there, or is not allowed.
    """
    if problem := name_problem(key, name, policy):
        raise ConfigError([problem])
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")) and cut > 1:
                continue
            raise _import_error(key, name, error) from error
        except Exception as error:
            raise _import_error(key, name, error) from error
        for position in range(cut, len(parts)):
            if not hasattr(found, parts[position]):
                where, missing = ".".join(parts[:position]), parts[position]
                hint = did_you_mean(missing, [option for option in dir(found) if not option.startswith("_")])
                raise ConfigError([f"{key}._target_={name}: {where} has no {missing}{hint}"])
            found = getattr(found, parts[position])
        break
    if not callable(found):
        raise ConfigError([f"{key}._target_={name}: that is neither a class nor a function"])
    # `torch.os.system` starts with an allowed name too; what counts is where the object comes from.
    home = getattr(found, "__module__", None)
    if home is not None and not policy.allows(home):
        raise ConfigError([f"{key}._target_={name}: that is {home}.{parts[-1]}, which is not built from a config"])
    return typing.cast(Callable[..., Any], found)


def _import_error(key: str, name: str, error: BaseException) -> ConfigError:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return ConfigError([f"{key}._target_={name}: {error} ({type(error).__name__} while importing it)"])


def parameters_of(key: str, name: str, policy: Policy, *, imports: bool) -> Parameters | None:
    """The parameters of a target, by name: from its source where that tells, otherwise by importing it, if allowed to.

    Raises:
        ConfigError: as `locate`.
    """
    if problem := name_problem(key, name, policy):
        raise ConfigError([problem])
    try:
        parameters = read_parameters(name, ALLOWED_PREFIXES)
    except MissingNameError as error:
        hint = did_you_mean(error.name, error.options)
        raise ConfigError([f"{key}._target_={name}: {error}{hint}"]) from None
    return _parameters(locate(key, name, policy)) if parameters is None and imports else parameters


def node_problems(
    key: str, node: Mapping[str, Any], policy: Policy, parameters: Mapping[str, inspect.Parameter]
) -> list[str]:
    """Everything wrong with the keys of one node, whose target takes `parameters`: unknown, missing, of wrong type."""
    problems = []
    for name, value in node.items():
        if name in RESERVED:
            continue
        parameter = parameters.get(name)
        if parameter is not None:
            needed = type_mismatch(parameter.annotation, value)
            if needed:
                problems.append(f"{key}.{name}={show(value)}: use {needed}")
        elif not takes_anything(parameters) and f"{key}.{name}" not in policy.read_keys:
            known = {f"{key}.{parameter}" for parameter in parameters}
            hint = did_you_mean(f"{key}.{name}", [*known, *(k for k in policy.read_keys if k.startswith(f"{key}."))])
            problems.append(f"{key}.{name}: {node['_target_']} takes no {name}{hint}")
    if not node.get("_partial_", False):
        missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC]
        problems += [f"{key}.{name}: {node['_target_']} needs it" for name in missing if name not in node]
    return problems


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@functools.cache
def _parameters(target: Callable[..., Any]) -> Parameters:
    """Parameters by name with their annotations evaluated where that is possible."""
    try:
        return dict(inspect.signature(target, eval_str=True).parameters)
    except NameError:  # an annotation that exists for type checkers only
        return dict(inspect.signature(target).parameters)
    except ValueError:  # a builtin without a signature
        return {"_": inspect.Parameter("_", inspect.Parameter.VAR_KEYWORD)}


def takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there is a `**` among the parameters."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def type_mismatch(annotation: Any, value: Any) -> str | None:
    """What the annotation asks for, in words, if a value from YAML does not fit it; None if it may fit."""
    return None if _fits(annotation, value) else _in_words(annotation)


def _fits(annotation: Any, value: Any) -> bool:
    if value is ANY_VALUE or (isinstance(value, dict) and "_target_" in value):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _fits(arguments[0], value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple, collections.abc.Sequence, set):
        return isinstance(value, list) and _items_fit(origin, arguments, value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    if annotation in (None, types.NoneType):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation in (str, os.PathLike) or getattr(annotation, "__module__", "") == "pathlib":
        return isinstance(value, str)
    if annotation in (list, tuple):
        return isinstance(value, list)
    return True


def _items_fit(origin: Any, arguments: tuple[Any, ...], values: list[Any]) -> bool:
    if not arguments:
        return True
    if origin is tuple and arguments[-1] is not Ellipsis:
        return len(values) == len(arguments) and all(map(_fits, arguments, values))
    return all(_fits(arguments[0], value) for value in values)


def _in_words(annotation: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if annotation in simple:
        return simple[annotation]
    if annotation is None:
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(argument) for argument in arguments))
    if origin is typing.Literal:
        return " or ".join(show(argument) for argument in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: {', '.join(_in_words(argument) for argument in arguments)}"
    if origin in (list, tuple, collections.abc.Sequence, set):
        return f"a list, each {_in_words(arguments[0])}" if arguments else "a list"
    return getattr(annotation, "__name__", str(annotation))


def instantiate(key: str, settings: Any, policy: Policy, runtime: Mapping[str, Any] | None = None) -> Any:
    """Builds a resolved node with all nodes in it; lists and dictionaries come out plain.

    A `_partial_` node becomes a `functools.partial`, unless `runtime` arguments complete it. `runtime` wins over the
    node's own keys.

    Raises:
        ConfigError: for keys that the target does not take.
        ValueError: as raised by the target, for a value out of range.
    """
    if isinstance(settings, list):
        return [instantiate(f"{key}[{index}]", value, policy) for index, value in enumerate(settings)]
    if not isinstance(settings, dict):
        return settings
    if "_target_" not in settings:
        return {name: instantiate(f"{key}.{name}", value, policy) for name, value in settings.items()}
    runtime = dict(runtime or {})
    target = locate(key, settings["_target_"], policy)
    parameters = _parameters(target)
    checked = {name: value for name, value in settings.items() if name not in runtime}
    problems = node_problems(key, {**checked, "_partial_": True}, policy, parameters)
    if problems:
        raise ConfigError(problems)
    arguments = {
        name: instantiate(f"{key}.{name}", value, policy)
        for name, value in settings.items()
        if name not in RESERVED and name not in runtime and (name in parameters or takes_anything(parameters))
    }
    if settings.get("_partial_", False) and not runtime:
        return functools.partial(target, **arguments)
    return target(**arguments, **runtime)
