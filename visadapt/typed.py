"""JSON values as dataclasses, every field of its annotated type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from visadapt.errors import VisadaptError

T = TypeVar("T")


def from_json(cls: type[T], values: Any) -> T:
    """An instance of a dataclass from the JSON values of a file.

    Args:
        cls: the dataclass.
        values: by the names of its fields; lists stand for tuples.

    Raises:
        TypeError: ``values`` is not a mapping, has an unknown field, lacks one, or holds a value of another type
            (booleans are not numbers).
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__} must be an object, got {type(values).__name__}")
    hints = get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls) if field.name in values):  # type: ignore[arg-type]
        if not fits(values[name], hints[name]):
            wanted = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise TypeError(f"{name} must be {wanted}, got {values[name]!r:.60}")
    return cls(**{key: tuple(value) if get_origin(hints.get(key)) is tuple else value for key, value in values.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; an int passes for a float, a list for a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def check_integer(value: Any, most: int, what: str, unit: str) -> None:
    """Refuse anything but an integer from 1 to ``most``.

    Raises:
        VisadaptError: the message names the bounds and the unit.
    """
    if not fits(value, int) or not 1 <= value <= most:
        raise VisadaptError(f"{what} must be an integer from 1 to {most} ({unit}), got {value!r}")
