"""Shapes checked at run time: in tests, what functions and dataclasses of nestling declare with jaxtyping is enforced.

Only annotations with shapes are checked (mypy sees the others), and what looks the same once: calls are many.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args, get_type_hints

import torch
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "nestling"
DTYPES = frozenset({"Bool", "Float", "Int", "Integer", "Num", "Shaped"})
MISSING = object()
switch = {"on": True}
"""Off in tests marked `any_shapes`, which give wrong ones on purpose."""


declared: list[Any] = []
"""Every function and dataclass that is checked."""


class ShapeError(AssertionError):
    """A value has another shape or dtype than what takes or returns it declares."""


def check_shapes() -> None:
    """Modules of nestling that are imported from now on are checked; none may be there already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        assert not [name for name in sys.modules if name.startswith(f"{PACKAGE}.")], "nestling was imported too early"
        sys.meta_path.insert(0, _Finder())


def checked(made: Any) -> Any:
    """A function that checks its arguments and its result, or a dataclass that checks its fields."""
    declared.append(made)
    if isinstance(made, type):
        made.__init__ = _checked_fields(made, made.__init__)
        return made
    shapes: dict[str, Any] = {}
    passed: set[Any] = set()
    places = list(inspect.signature(made).parameters)

    @wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not switch["on"]:
            return made(*args, **kwargs)
        if not shapes:
            shapes.update(shapes_of(made))
        given = {}
        for name in shapes:
            if name != "return":
                at = places.index(name)
                given[name] = args[at] if at < len(args) else kwargs.get(name, MISSING)
        _check_once(made, given, shapes, passed)
        result = made(*args, **kwargs)
        if "return" in shapes and not inspect.isgenerator(result):
            _check_once(made, given | {"return": result}, shapes, passed)
        return result

    return call


def _checked_fields(made: type, init: Callable[..., None]) -> Callable[..., None]:
    shapes: dict[str, Any] = {}
    passed: set[Any] = set()

    @wraps(init)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if torch.compiler.is_compiling() or not switch["on"]:
            return
        if not shapes:
            shapes.update(shapes_of(made))
        _check_once(made, {name: getattr(self, name) for name in shapes}, shapes, passed)

    return call


def _check_once(made: Any, values: dict[str, Any], shapes: dict[str, Any], passed: set[Any]) -> None:
    """Check what has not passed with these types, dtypes and shapes before: the checks were a quarter of all tests."""
    key = tuple(map(_looks, values.values()))
    if key in passed:
        return
    with jaxtyped("context"):
        for name, value in values.items():
            _check(made, "what it returns" if name == "return" else name, value, shapes[name])
    passed.add(key)


def _looks(value: Any) -> Any:
    """All that a check sees of a value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, list | tuple):
        return type(value), *map(_looks, value)
    if isinstance(value, dict):
        return type(value), *((name, _looks(part)) for name, part in value.items())
    return type(value)


def shapes_of(made: Any) -> dict[str, Any]:
    """The annotations that say a shape; one that cannot be read is an error."""
    hints = get_type_hints(made)
    if isinstance(made, type):
        hints = {f.name: hints[f.name] for f in dataclasses.fields(made)}
    return {name: hint for name, hint in hints.items() if _says_a_shape(hint)}


def _says_a_shape(hint: Any) -> bool:
    array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return array or any(_says_a_shape(part) for part in get_args(hint) if not isinstance(part, list))


def _check(made: Any, name: str, value: Any, hint: Any) -> None:
    if value is MISSING or is_bearable(value, hint):
        return
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:300]
    raise ShapeError(f"{made.__module__}.{made.__qualname__}: {name} is {found}, but was declared {hint}")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's own answer, with a loader that checks."""
        if fullname.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        """Compiled anew where there are shapes: the cache of compiled files is everybody's."""
        source = self.get_data(self.path)
        if b"jaxtyping" not in source:
            return super().get_code(fullname)
        tree = ast.parse(source, self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and _has_shapes([*_annotations(node.args), node.returns]):
                node.decorator_list.append(_decorator(node))
            elif isinstance(node, ast.ClassDef) and _is_dataclass(node) and _has_shapes(_fields(node)):
                node.decorator_list.insert(0, _decorator(node))
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.orelse = [_anything(name) for name in _imported(node)]
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


def _annotations(args: ast.arguments) -> list[ast.expr | None]:
    return [a.annotation for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def _fields(node: ast.ClassDef) -> list[ast.expr]:
    return [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]


def _has_shapes(annotations: Sequence[ast.expr | None]) -> bool:
    names = [n for a in annotations if a is not None for n in ast.walk(a) if isinstance(n, ast.Subscript)]
    return any(isinstance(n.value, ast.Name) and n.value.id in DTYPES for n in names)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _imported(block: ast.If) -> list[str]:
    imports = [n for n in block.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return [alias.asname or alias.name.split(".")[0] for n in imports for alias in n.names]


def _anything(name: str) -> ast.stmt:
    """What is imported for type checkers alone is not known at run time."""
    return ast.parse(f"{name} = __import__('typing').Any").body[0]


def _decorator(node: ast.stmt) -> ast.expr:
    call = ast.parse(f"__import__('{__name__}', fromlist=['checked']).checked", mode="eval").body
    return ast.copy_location(call, node)
