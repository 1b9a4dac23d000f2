"""Signatures of classes and functions, read from their source: nothing of it is imported or run.

Importing what a config names brings in torch, and takes seconds; a setting that its target does not take is answered
before. Only plain source is read: where decorators, metaclasses and the like could change a signature, the answer is
None, and the caller imports the target after all.
"""

import ast
import builtins
import copy
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Parameters = dict[str, inspect.Parameter]

# Of the standard library, whose names mean something in the annotation of a setting.
VOCABULARY = ("typing", "collections.abc", "pathlib", "os", "types")
WITHOUT_PARAMETERS = ("abc.ABC", "typing.Generic", "typing.Protocol", "builtins.object")
EMPTY = inspect.Parameter.empty


@dataclass
class _Module:
    """What the top level of a file binds: definitions and assigned values as syntax, imports as dotted names.

    `complete` tells that nothing else can be bound: no `import *`, no branches.
    """

    name: str
    bound: dict[str, ast.ClassDef | ast.FunctionDef | ast.expr | str] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class _Found:
    """A definition and where it stands."""

    module: _Module
    syntax: ast.ClassDef | ast.FunctionDef


class MissingNameError(LookupError):
    """There is a module, and it does not have the name: `options` are those that it has."""

    def __init__(self, module: str, name: str, options: list[str]) -> None:
        super().__init__(f"{module} has no {name}")
        self.module, self.name, self.options = module, name, options


class _UnclearError(Exception):
    """The source does not tell."""


@cache
def read_parameters(name: str, packages: tuple[str, ...]) -> Parameters | None:
    """The parameters of the class or function called `name`, by name, or None where its source does not tell.

    Annotations are evaluated; a class in one, such as a tensor, is represented by an empty one of the same name.
    Defaults are `...`: only that there is one is known.

    Args:
        name: with its module, as in `_target_`.
        packages: whose source is read; names that lead elsewhere give None.

    Raises:
        MissingNameError: the module is there and does not have the name.
    """
    try:
        return _parameters(_find(name, packages), packages)
    except _UnclearError:
        return None


# ---------------------------------------------------------------------- finding a definition


def _find(name: str, packages: tuple[str, ...]) -> _Found:
    parts = name.split(".")
    if parts[0] not in packages:
        raise _UnclearError
    for cut in range(len(parts) - 1, 0, -1):
        module = _module(".".join(parts[:cut]))
        if module is not None:
            break
    else:
        raise _UnclearError
    first, *rest = parts[cut:]
    if rest:
        raise _UnclearError
    found = module.bound.get(first)
    if found is None and module.complete and _module(name) is None:
        raise MissingNameError(module.name, first, sorted(option for option in module.bound if option[0] != "_"))
    if isinstance(found, str):
        return _find(found, packages)
    if isinstance(found, ast.ClassDef | ast.FunctionDef):
        return _Found(module, found)
    raise _UnclearError


@cache
def _module(name: str) -> _Module | None:
    """None where there is no source file of that name."""
    path = _file(name)
    if path is None:
        return None
    module = _Module(name)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for statement in ast.parse(path.read_bytes()).body:
        match statement:
            case ast.ClassDef() | ast.FunctionDef():
                module.bound[statement.name] = statement
            case ast.ImportFrom():
                source = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
                for alias in statement.names:
                    module.bound[alias.asname or alias.name] = f"{source}.{alias.name}"
                    module.complete &= alias.name != "*"
            case ast.Import():
                for alias in statement.names:
                    module.bound[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else ""
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                module.bound[target] = value
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                module.bound[target] = value
            case ast.Expr():
                pass
            case _:
                module.complete = False
    module.complete &= "__getattr__" not in module.bound
    return module


def _file(name: str) -> Path | None:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # looks, but does not import
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


# ---------------------------------------------------------------------- reading a definition


def _parameters(found: _Found, packages: tuple[str, ...]) -> Parameters:
    syntax = found.syntax
    if isinstance(syntax, ast.FunctionDef):
        return _of_function(syntax, found.module)
    if _is_dataclass(syntax, found.module):
        return _of_dataclass(found, packages)
    if syntax.decorator_list or syntax.keywords:
        raise _UnclearError
    methods = {node.name: node for node in syntax.body if isinstance(node, ast.FunctionDef)}
    if "__new__" in methods:
        raise _UnclearError
    if "__init__" in methods:
        parameters = _of_function(methods["__init__"], found.module)
        del parameters[next(iter(parameters))]  # self
        return parameters
    bases = _bases(found)
    return _parameters(_find(bases[0], packages), packages) if bases else {}


def _bases(found: _Found) -> list[str]:
    """The dotted names of the bases that can have parameters; several could share them in ways not followed here."""
    assert isinstance(found.syntax, ast.ClassDef)
    names = [_dotted(base, found.module) for base in found.syntax.bases]
    names = [name for name in names if name not in WITHOUT_PARAMETERS]
    if len(names) > 1:
        raise _UnclearError
    return names


def _dotted(node: ast.expr, module: _Module) -> str:
    match node:
        case ast.Subscript(value=value):
            return _dotted(value, module)
        case ast.Attribute(value=value, attr=attribute):
            return f"{_dotted(value, module)}.{attribute}"
        case ast.Name(id=name):
            bound = module.bound.get(name)
            if isinstance(bound, str):
                return bound or name
            return f"{module.name}.{name}" if bound is not None else f"builtins.{name}"
    raise _UnclearError


def _of_function(syntax: ast.FunctionDef, module: _Module) -> Parameters:
    if syntax.decorator_list:
        raise _UnclearError
    arguments = copy.deepcopy(syntax.args)
    annotations = {node.arg: node.annotation for node in ast.walk(arguments) if isinstance(node, ast.arg)}
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    default = ast.Constant(...)
    arguments.defaults = [default for _ in arguments.defaults]
    arguments.kw_defaults = [None if value is None else default for value in arguments.kw_defaults]
    like_it = ast.Expression(ast.Lambda(arguments, default))
    stub = eval(compile(ast.fix_missing_locations(like_it), "<signature>", "eval"))
    return {
        name: parameter.replace(annotation=_annotation(annotations[name], module))
        for name, parameter in inspect.signature(stub).parameters.items()
    }


def _is_dataclass(syntax: ast.ClassDef, module: _Module) -> bool:
    if len(syntax.decorator_list) != 1:
        return False
    (decorator,) = syntax.decorator_list
    named = decorator.func if isinstance(decorator, ast.Call) else decorator
    return _dotted(named, module) == "dataclasses.dataclass"


def _of_dataclass(found: _Found, packages: tuple[str, ...]) -> Parameters:
    """The fields of the bases, then those of the class itself."""
    syntax, module = found.syntax, found.module
    assert isinstance(syntax, ast.ClassDef)
    if syntax.keywords or any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in syntax.body):
        raise _UnclearError
    (decorator,) = syntax.decorator_list
    options = {word.arg: word.value for word in decorator.keywords} if isinstance(decorator, ast.Call) else {}
    if "init" in options:
        raise _UnclearError
    keyword_only = "kw_only" in options and ast.literal_eval(options["kw_only"])
    kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters: Parameters = {}
    for base in _bases(found):
        parent = _find(base, packages)
        if isinstance(parent.syntax, ast.ClassDef) and _is_dataclass(parent.syntax, parent.module):
            parameters |= _of_dataclass(parent, packages)
        elif _parameters(parent, packages):
            raise _UnclearError
    for name, annotation, has_default in _fields(syntax, module):
        parameters[name] = inspect.Parameter(
            name, kind, default=... if has_default else EMPTY, annotation=_annotation(annotation, module)
        )
    return parameters


def _fields(syntax: ast.ClassDef, module: _Module) -> Iterator[tuple[str, ast.expr, bool]]:
    """Name, annotation and whether there is a default, of each field that `__init__` takes."""
    for node in syntax.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        written = ast.unparse(node.annotation)
        if "KW_ONLY" in written or "InitVar" in written:
            raise _UnclearError
        if written.startswith(("ClassVar", "typing.ClassVar")):
            continue
        has_default = node.value is not None
        if isinstance(node.value, ast.Call) and _dotted(node.value.func, module) == "dataclasses.field":
            words = {word.arg: word.value for word in node.value.keywords}
            if "init" in words and not ast.literal_eval(words["init"]):
                continue
            if "kw_only" in words:
                raise _UnclearError
            has_default = bool({"default", "default_factory"} & words.keys())
        yield node.target.id, node.annotation, has_default


# ---------------------------------------------------------------------- annotations


def _annotation(syntax: ast.expr | None, module: _Module) -> Any:
    if syntax is None:
        return EMPTY
    if isinstance(syntax, ast.Constant) and isinstance(syntax.value, str):
        syntax = ast.parse(syntax.value, mode="eval").body
    try:
        return eval(ast.unparse(syntax), {"__builtins__": {}}, _Names(module))
    except Exception:  # more than names, `|` and brackets: it fits every value, as what is not annotated does
        return Any


@dataclass(frozen=True)
class _Names(Mapping[str, Any]):
    """What the names in the annotations of a module stand for."""

    module: _Module

    def __getitem__(self, name: str) -> Any:
        bound = self.module.bound.get(name)
        if bound is None and hasattr(builtins, name):
            return getattr(builtins, name)
        if isinstance(bound, str):
            source, _, last = bound.rpartition(".")
            if source in VOCABULARY:
                return getattr(importlib.import_module(source), last)
            module = _module(source) if source else None
            return _Names(module)[last] if module is not None else _stand_in(name)
        if isinstance(bound, ast.Name | ast.Subscript | ast.BinOp | ast.Attribute):
            return _annotation(bound, self.module)
        return _stand_in(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.module.bound)

    def __len__(self) -> int:
        return len(self.module.bound)


@cache
def _stand_in(name: str) -> type:
    """A class of that name, of which nothing else is known."""
    return type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
