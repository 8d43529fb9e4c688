"""JSON of files, with bounds on its size, depth and digits."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from visadapt.limits import check_limit, limit

# a string that is not closed ends with the text: to look for its end from each of its quotes takes quadratic time
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)

_BRACKET = re.compile(r"[\[\]{}]")


def parse_json(text: str, what: str = "it") -> Any:
    """Parse JSON that a file holds.

    Args:
        text: the JSON text.
        what: it belongs to, for messages.

    Raises:
        VisadaptError: it is larger, deeper, of more values or of longer integers than `visadapt.limits.LIMITS` allows.
        ValueError: it is not JSON, or an object has a key twice, of which other programs may take the other.
    """
    check_limit(len(text), "JSON_BYTES", what)
    brackets = text.count("[") + text.count("{")
    # an empty list of two bytes takes a hundred in memory
    check_limit(text.count(",") + brackets, "JSON_VALUES", what)
    if brackets > 16:
        check_limit(_depth(text), "JSON_DEPTH", what)

    def integer(digits: str) -> int:
        check_limit(len(digits), "JSON_DIGITS", what)
        return int(digits)

    # called for each integer: only where there is a run of more digits than may be
    long = re.search(rf"\d{{{limit('JSON_DIGITS')}}}", text)
    return json.loads(text, parse_int=integer if long else None, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has the key {next(name for name, count in counts.items() if count > 1)!r:.80} twice")
    return found


def _depth(text: str) -> int:
    """How deep lists and objects lie inside each other; strings may hold brackets of their own."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest
