"""The error that visadapt raises, its hint at the nearest right name, and how it spells an option."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

from visadapt.printable import printable

_COMMAND_LINE: ContextVar[bool] = ContextVar("command_line", default=False)


class VisadaptError(ValueError):
    """A request was invalid; the message says what was wrong and, if possible, the nearest right name.

    It is raised before anything is changed: model, task and file are as they were.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> visadapt.activate(model, "flower")
        Traceback (most recent call last):
            ...
        visadapt.errors.VisadaptError: no task 'flower'; did you mean 'flowers'?
    """

    def __str__(self) -> str:
        # a message may quote the name of a file, which must not act on a terminal or a log
        return "\n".join(map(printable, super().__str__().split("\n")))


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message, which may be long; the name of its class if it has no message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def device_errors(device: object) -> Iterator[None]:
    """Raise what torch raises about a device in this block as a `VisadaptError` that names it."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise VisadaptError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error


def nearest(name: object, names: Iterable[str]) -> str:
    """Return a hint such as ``"; did you mean 'flowers'?"`` or, if no name is similar, a list of the names.

    Args:
        name: the name that was not found.
        names: the existing names.

    Returns:
        Text to append to an error message; empty if ``names`` is empty.
    """
    known = sorted({str(n) for n in names})
    # nothing is near to what is not a string
    given = str.__str__(name) if isinstance(name, str) else ""
    letters = unicodedata.normalize("NFC", given)
    same = next((n for n in known if letters and n != given and unicodedata.normalize("NFC", n) == letters), None)
    if same is not None:
        return f"; {same!r} has the same letters, composed otherwise: rename one (Unicode NFC or NFD)"
    # of a name of megabytes, comparing would take seconds
    close = get_close_matches(letters[:500], known, n=3, cutoff=0.5) if letters else []
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"; there is: {shown}"


def option(name: str, value: str = "") -> str:
    """Spell an option as the caller gives it: ``text=`` to a function, ``--text VALUE`` on the command line.

    Args:
        name: the parameter of the function.
        value: what stands for its value on the command line.
    """
    return f"--{name.replace('_', '-')} {value}".rstrip() if _COMMAND_LINE.get() else f"{name}="


def setting(name: str, value: object) -> str:
    """Spell an option of a method as the caller gives it: ``activation=None``, or ``--option activation=null``.

    Args:
        name: the option.
        value: a value that JSON can hold.
    """
    return f"--option {name}={json.dumps(value)}" if _COMMAND_LINE.get() else f"{name}={value!r}"


def check_unused(unused: Iterable[str], why: str) -> None:
    """Refuse options that have no effect.

    Args:
        unused: names of the options that were given without need, as parameters of a function.
        why: the reason, as a clause: ``"photos is a folder of classes"``.

    Raises:
        VisadaptError: there are some; they are named.
    """
    refuse_without_effect([option(name) for name in unused], why)


def refuse_without_effect(spelt: Sequence[str], why: str) -> None:
    """Do what `check_unused` does for options that are spelt already."""
    if spelt:
        raise VisadaptError(f"{' and '.join(spelt)} {'has' if len(spelt) == 1 else 'have'} no effect: {why}")


@contextmanager
def command_line() -> Iterator[None]:
    """Let messages spell options as the command line does."""
    token = _COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _COMMAND_LINE.reset(token)
