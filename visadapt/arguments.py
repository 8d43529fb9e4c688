"""Arguments compared with annotations: a wrong type is one error that names the argument."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from visadapt.errors import VisadaptError, first_line
from visadapt.printable import shown

P = ParamSpec("P")
R = TypeVar("R")

_MISSING = object()


def takes(*own: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function refuse arguments of another type than it is annotated with, before it does anything.

    Args:
        *own: parameters that the function checks itself.

    Returns:
        A decorator. The function keeps its name, signature and documentation.

    Examples:
        >>> from visadapt.arguments import takes
        >>> @takes()
        ... def double(number: float) -> float:
        ...     return 2 * number
        >>> double(2)
        4
        >>> double("2")
        Traceback (most recent call last):
            ...
        visadapt.errors.VisadaptError: number must be a number, got '2'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints: dict[str, Any] = {}

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if not hints:
                hints.update(_hints(function, [name for name in signature.parameters if name not in own]))
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            for name, value in list(bound.arguments.items()):
                kind = signature.parameters[name].kind
                if isinstance(value, str) and type(value) is not str:
                    # numpy's, say; a subclass may compare as it likes
                    value = bound.arguments[name] = str.__str__(value)
                if name in hints and kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                    check_argument(value, hints[name], name)
                    bound.arguments[name] = plain_number(value)
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def check_fields(instance: Any, *own: str) -> None:
    """Refuse a dataclass of which a field has another type than it is annotated with.

    Args:
        instance: of a dataclass, as its ``__post_init__`` sees it.
        *own: fields that the class checks itself.

    Raises:
        VisadaptError: the field is named.
    """
    names = [field.name for field in dataclasses.fields(instance) if field.name not in own]
    cls: Any = type(instance)
    for name, hint in _class_hints(cls, tuple(names)).items():
        check_argument(getattr(instance, name), hint, name)


@functools.cache
def _class_hints(cls: type, names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__annotations__" in base.__dict__:
            found.update(_hints(base, [name for name in names if name in base.__annotations__]))
    return found


def _hints(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """Annotations as objects; those that only a type checker can resolve are left out."""
    # a decorator below this one has globals of its own
    space = getattr(inspect.unwrap(owner), "__globals__", None) or vars(inspect.getmodule(owner))
    found = {}
    for name in names:
        hint = owner.__annotations__.get(name, Any)
        try:
            found[name] = eval(hint, space) if isinstance(hint, str) else hint
        except (NameError, TypeError):
            continue
    return found


def check_argument(value: Any, hint: Any, name: str) -> None:
    """Refuse a value of another type than an annotation says, and numbers that are not finite.

    Raises:
        VisadaptError: the argument is named.
    """
    try:
        right = matches(value, hint)
        value, hint, name = (value, hint, name) if right else _innermost(value, hint, name)
    except Exception as error:  # of a stranger's class
        raise VisadaptError(
            f"{name} must be {_words(hint)}, got a {type(value).__name__} that fails: {first_line(error)}"
        ) from error
    if not right:
        plain = isinstance(value, str | int | float | complex | bytes | None)
        got = shown(value, 80) if plain else type(value).__name__
        raise VisadaptError(f"{name} must be {_words(hint)}, got {got}")
    if isinstance(value, float) and not math.isfinite(value):
        raise VisadaptError(f"{name} must be a finite number, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise VisadaptError(f"{name} must be a number below 2**63, got {shown(value, 80)}")
    if isinstance(value, str | os.PathLike) and any(_is_path(one) for one in get_args(hint)):
        check_path(value, name)


def check_path(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a path that no file of this system can have.

    Raises:
        VisadaptError: it is made of bytes, is too long, has a null character, or cannot be encoded; the argument is
            named.
    """
    usable = False
    try:
        usable = isinstance(os.fspath(path), str)
        os.lstat(path)
    except OSError as error:
        usable = usable and error.errno not in (errno.ENAMETOOLONG, errno.EINVAL)
    except Exception:  # of a stranger's class, or a ValueError
        usable = False
    if not usable:
        raise VisadaptError(f"{name} must be a path that a file can have, got {shown(path, 80)}")


def plain_number(value: Any) -> Any:
    """A number of numpy as Python's own; anything else as it is."""
    if isinstance(value, int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_path(hint: Any) -> bool:
    return getattr(get_origin(hint), "__name__", "") == "PathLike"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise what a container of a stranger's class raises in this block as a `VisadaptError` that names it."""
    try:
        yield
    except VisadaptError:
        raise
    except Exception as error:
        raise VisadaptError(f"{what} cannot be read ({type(error).__name__}: {first_line(error):.300})") from error


def readable(value: Any, hint: Any) -> bool:
    """Whether `matches`, and a sequence can be read: one of a stranger's class may raise."""
    try:
        if isinstance(value, AbstractSequence):
            list(value)
        return matches(value, hint)
    except Exception:  # of a stranger's class
        return False


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: integers are numbers, booleans are not, strings are not sequences."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):
        hint = hint.__bound__ or Any
    if hint is Any or isinstance(hint, str):
        return True
    if origin is Literal:
        # which of them there are is said by the function, with the nearest one
        return type(value) in set(map(type, inner))
    if origin in (Union, types.UnionType):
        return any(matches(value, one) for one in inner)
    if hint is None or hint is type(None):
        return value is None
    if origin is tuple:
        # lists are as good
        if not isinstance(value, tuple | list):
            return False
        each = inner[:1] * len(value) if len(inner) == 2 and inner[1] is ... else inner
        return len(each) == len(value) and all(map(matches, value, each))
    if origin is not None and issubclass(origin, Mapping):
        whole = isinstance(value, origin)
        return whole and all(matches(k, inner[0]) and matches(v, inner[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, AbstractSequence):
        whole = isinstance(value, origin if origin is list else AbstractSequence) and not isinstance(value, str | bytes)
        # a sequence of anything need not be read, which may take long
        return whole and (inner[0] is Any or all(matches(one, inner[0]) for one in value))
    if origin is not None:
        text = isinstance(value, str | bytes | Mapping) and origin is not Callable and origin is not type
        return isinstance(value, origin) and not text if origin is Iterable else isinstance(value, origin)
    if isinstance(value, bool):
        return hint is bool or hint is object
    if hint is int:
        return isinstance(value, numbers.Integral)
    if hint is float:
        return isinstance(value, numbers.Real)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _innermost(value: Any, hint: Any, name: str) -> tuple[Any, Any, str]:
    """The element of a mapping or a sequence that has the wrong type, with its annotation and its name."""
    for one in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin, inner = get_origin(one), get_args(one)
        if not isinstance(origin, type) or isinstance(value, str | bytes) or not isinstance(value, origin):
            continue
        held: Any = value
        if issubclass(origin, Mapping):
            for key, element in held.items():
                if not matches(key, inner[0]):
                    return key, inner[0], f"a key of {name}"
                if not matches(element, inner[1]):
                    return _innermost(element, inner[1], f"{name}[{key!r}]")
        elif issubclass(origin, AbstractSequence) and (origin is not tuple or inner[-1] is ...):
            for index, element in enumerate(held):
                if not matches(element, inner[0]):
                    return _innermost(element, inner[0], f"{name}[{index}]")
    return value, hint, name


_NAMES: dict[Any, str] = {
    str: "a string", int: "an integer", float: "a number", bool: "True or False", None: "None", type(None): "None",
}  # fmt: skip


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(map(_words, inner)))
        if "an integer" in words and "a number" in words:
            words.remove("an integer")
        return " or ".join(words)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin is Literal:
        return " or ".join(dict.fromkeys(_words(type(value)) for value in inner))
    if origin is not None:
        if _is_path(hint):
            return "a path"
        if origin.__name__ == "Callable":
            return "a function"
        items = [one for one in inner if one is not ...]
        of = f" of {', '.join(map(_plural, items))}" if items else ""
        return f"a {origin.__name__.lower()}{of}"
    module = getattr(hint, "__module__", "")
    name = getattr(hint, "__name__", str(hint))
    if module.startswith("torch.nn.modules"):
        return f"a torch.nn.{name}"
    return f"a {name}"


def _plural(hint: Any) -> str:
    return {str: "strings", int: "integers", float: "numbers", Any: "anything"}.get(hint, _words(hint))
