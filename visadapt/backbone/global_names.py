"""Global variables that a class's functions name: those of its own file, and those of files that it imports."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

Named = dict[int, tuple[dict[str, Any], set[str]]]
"""Names of global variables in use, with the variables themselves, by the identity of these."""

_SCALARS = (bool, int, float, complex, str, bytes, type(None))

_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}

_MOST = 64
"""Elements of the largest list or dict that counts as settings."""


def read_globals(values: Iterable[Any], named: Named) -> None:
    """Collect the global variables that functions name, and the functions of the same file that these call.

    Args:
        values: the functions, among other attributes of a class: methods of any kind, and properties.
        named: is added to.
    """
    waiting = [function for value in values for function in _functions(value)]
    while waiting:
        function = waiting.pop()
        variables, names = function.__globals__, set(_names(function.__code__))
        known = _known(variables, named)
        for name in [name for name in names if name in variables and not name.startswith("__")]:
            held = variables[name]
            if isinstance(held, ModuleType) and held.__name__.partition(".")[0] not in _LIBRARIES:
                _known(vars(held), named).update(each for each in names if each in vars(held))
            elif isinstance(held, FunctionType) and held.__globals__ is variables and name not in known:
                waiting.append(held)
            known.add(name)


def _known(variables: dict[str, Any], named: Named) -> set[str]:
    return named.setdefault(id(variables), (variables, set()))[1]


def is_setting(value: Any) -> bool:
    """Return whether a variable's value can be a setting: a number, text, flag, or a list or dict of some of these."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        inner = [*value.values()] if isinstance(value, dict) else [*value]
        return len(inner) <= _MOST and all(type(each) in _SCALARS for each in inner)
    return type(value) in _SCALARS


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, property):
        candidates: tuple[Any, ...] = (value.fget, value.fset)
    else:
        candidates = (getattr(value, "__func__", value),)
    for each in candidates:
        while each is not None and hasattr(each, "__wrapped__"):
            if isinstance(each, FunctionType):
                yield each
            each = each.__wrapped__
        if isinstance(each, FunctionType):
            yield each


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
