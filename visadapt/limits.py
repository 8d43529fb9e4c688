"""Bounds on what is read from files, which a user can raise by environment variables."""

from __future__ import annotations

import os

from visadapt.errors import VisadaptError

LIMITS: dict[str, tuple[int, str]] = {
    "JSON_BYTES": (16_000_000, "bytes of JSON"),
    "JSON_DEPTH": (64, "levels of nested JSON"),
    "JSON_VALUES": (1_000_000, "values in JSON"),
    "JSON_DIGITS": (100, "digits in an integer"),
    "IMAGE_PIXELS": (89_478_485, "pixels"),
    "UNPACKED_RATIO": (100, "bytes per byte on the disk"),
    "BACKBONE_BYTES": (1_000_000_000, "bytes of parameters"),
}
"""Default and unit of each bound. ``VISADAPT_MAX_JSON_BYTES``, say, replaces the default."""


def variable(name: str) -> str:
    """Name of the environment variable that raises a bound."""
    return f"VISADAPT_MAX_{name}"


def limit(name: str) -> int:
    """The value of a bound: that of its environment variable, or else the default.

    Args:
        name: one of ``LIMITS``.

    Raises:
        VisadaptError: the variable is not a positive integer.

    Examples:
        >>> from visadapt.limits import limit
        >>> limit("JSON_DEPTH")
        64
    """
    text = os.environ.get(variable(name))
    if text is None:
        return LIMITS[name][0]
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
        raise VisadaptError(f"{variable(name)} must be a positive integer ({LIMITS[name][1]}), got {text!r:.60}")
    return int(text)


def check_limit(value: float, name: str, what: str) -> None:
    """Refuse a value above a bound, naming the variable that raises it.

    Args:
        value: the value.
        name: of the bound, one of ``LIMITS``.
        what: it belongs to, for the message.

    Raises:
        VisadaptError: the value is larger.
    """
    most = limit(name)
    if value > most:
        raise VisadaptError(
            f"{what} has more than {most:,} {LIMITS[name][1]}: if you trust it, raise the bound by {variable(name)}"
        )
