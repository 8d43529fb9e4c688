"""Argument checks shared by methods, recipes and task files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from visadapt.errors import VisadaptError, nearest
from visadapt.printable import shown

_LARGEST = 2**63
"""What tensors count with."""


def check_num_classes(num_classes: object) -> None:
    """Refuse anything but a positive integer or None."""
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or not 1 <= num_classes < _LARGEST
    ):
        raise VisadaptError(f"num_classes must be a positive integer, got {shown(num_classes)}")


def check_width(m: Any, what: str = "m") -> None:
    """Refuse widths that are neither a positive integer nor a fraction."""
    whole = isinstance(m, int) and not isinstance(m, bool) and 1 <= m < _LARGEST
    fraction = isinstance(m, float) and math.isfinite(m) and 0 < m < 1
    if not whole and not fraction:
        raise VisadaptError(
            f"{what} must be a positive integer, or a fraction of the site's channels in (0, 1); got {shown(m)}"
        )


def is_real(value: Any) -> bool:
    """Whether a value is a finite number, not a bool or a string."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, float) and math.isfinite(value)


def check_count(value: Any, what: str) -> None:
    """Refuse anything but a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST:
        raise VisadaptError(f"{what} must be a positive integer, got {shown(value)}")


def check_positive(value: Any, what: str) -> None:
    """Refuse anything but a positive number."""
    if not is_real(value) or value <= 0:
        raise VisadaptError(f"{what} must be a positive number, got {shown(value)}")


def check_probability(value: Any, what: str = "dropout") -> None:
    """Refuse anything but a probability below 1."""
    if not is_real(value) or not 0 <= value < 1:
        raise VisadaptError(f"{what} must be a probability in [0, 1), got {shown(value)}")


def check_std(value: Any, what: str = "init_std") -> None:
    """Refuse a standard deviation that is neither None nor a number in (0, 10]."""
    if value is not None and not (is_real(value) and 0 < value <= 10):
        raise VisadaptError(f"{what} must be None (exact identity) or a number in (0, 10], got {shown(value)}")


def check_flag(value: Any, what: str) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise VisadaptError(f"{what} must be True or False, got {shown(value)}")


def is_among(value: Any, choices: Iterable[Any]) -> bool:
    """Whether a value equals one of the choices; an array, and what cannot be compared, does not."""
    try:
        return any(bool(value == choice) for choice in choices)
    except Exception:  # of a stranger's class
        return False


def check_choice(value: Any, choices: Any, what: str) -> None:
    """Refuse a value that is not one of ``choices``, naming the nearest."""
    if not is_among(value, choices):
        raise VisadaptError(f"no {what} {shown(value)}{nearest(value, [str(c) for c in choices])}")


def check_fraction(value: Any, what: str) -> None:
    """Refuse anything but a number in [0, 1)."""
    if not is_real(value) or not 0 <= value < 1:
        raise VisadaptError(f"{what} must be a number in [0, 1), got {shown(value)}")


def check_non_negative(value: Any, what: str) -> None:
    """Refuse anything but a number that is at least 0."""
    if not is_real(value) or value < 0:
        raise VisadaptError(f"{what} must be a number that is at least 0, got {shown(value)}")
