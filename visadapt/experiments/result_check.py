"""Results of files: numbers in range, names of one printable line, and the facts that each experiment has."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from visadapt.errors import VisadaptError
from visadapt.printable import printable
from visadapt.typed import fits

LONGEST = 1000
"""Characters of a name or another text."""

_LEAST = {
    **dict.fromkeys(("seed", "trained", "head", "seconds", "bytes", "lr", "epochs"), 0),
    **dict.fromkeys(("backbone", "samples"), 1),
}

FACTS: dict[str, dict[str, Any]] = {
    "ablation": {"first": int | None, "last": int | None, "norms": str, "layers": int, "majority": float},
    "crossmodal": {"weights": str, "m": int},
    "decathlon": {"problems": list[str], "seeds": int, "total": float},
    "init_scale": {"std": float},
    "modality": {"where": str, "k": int, "layers": int},
    "sequence": {"position": int, "after": str, "total": float, "outputs": str},
    "tradeoff": {"m": int | float, "n": int},
    "transfer": {"source": str | None},
}
"""Type of each fact by experiment; others are not read."""

_OPTIONAL: dict[str, set[str]] = {
    **{name: set(FACTS[name]) for name in ("decathlon", "modality", "tradeoff")},
    "ablation": {"layers", "majority"},
    "crossmodal": {"m"},
}

_COORDINATED = {"decathlon": "total", "modality": "where"}
"""A fact with which all others of its experiment come, but for the number of seeds, which came later."""


def check_name(value: str, what: str) -> None:
    """Refuse a name that could not be read back from a result.

    Raises:
        VisadaptError: it is empty, too long, or has control characters.
    """
    if not value or printable(value) != value or len(value) > LONGEST:
        raise VisadaptError(f"{what} must be one line of printable text, got {printable(value)!r:.60}")


def check_values(result: Any) -> None:
    """Refuse a result with a number out of range, or a text of more than a printable line.

    Args:
        result: a `visadapt.experiments.Result` whose fields have their types.

    Raises:
        VisadaptError: the field is named.
    """
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    try:
        json.dumps(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise VisadaptError(f"facts and machine must be JSON values: {error}") from error
    for name, value in _texts(fields, ""):
        if printable(value) != value or len(value) > LONGEST:
            raise VisadaptError(f"{name} must be one line of printable text, got {printable(value):.60}")
    for name in ("setting", "regime"):
        if getattr(result, name) == "":
            raise VisadaptError(f"{name} must be a name or null, got ''")
    for name, least in _LEAST.items():
        value = getattr(result, name)
        if value is not None and (not math.isfinite(value) or value < least):
            raise VisadaptError(f"{name} must be a number that is at least {least}, got {value!r}")
    if not math.isfinite(result.score):
        raise VisadaptError(f"score must be a finite number, got {result.score!r}")


def check_facts(result: Any) -> None:
    """Refuse a result without the facts that its experiment writes, or with facts of other types.

    Args:
        result: a `visadapt.experiments.Result`.

    Raises:
        VisadaptError: the fact is named.
    """
    expected = FACTS.get(result.experiment, {})
    optional = _OPTIONAL.get(result.experiment, set())
    if _COORDINATED.get(result.experiment) in result.facts or result.metric == result.experiment:
        optional = {"seeds"}
    for name, hint in expected.items():
        if name not in result.facts:
            if name not in optional:
                raise VisadaptError(f"facts must have {name!r}")
            continue
        value = result.facts[name]
        if not fits(value, hint) or (isinstance(value, float) and not math.isfinite(value)):
            raise VisadaptError(f"fact {name!r} must be {getattr(hint, '__name__', hint)}, got {value!r:.60}")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """All texts in JSON values, with the names of their fields."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key, f"a name in {name}" if name else "a field")
            yield from _texts(inner, f"{name}.{printable(key)}" if name else printable(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, name)
