"""JSON of files, with bounds on its size, depth and digits."""

from __future__ import annotations

import json
import re
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
        VisadaptError: it is larger, deeper or of longer integers than `visadapt.limits.LIMITS` allows.
        ValueError: it is not JSON.
    """
    check_limit(len(text), "JSON_BYTES", what)
    if text.count("[") + text.count("{") > 16:
        check_limit(_depth(text), "JSON_DEPTH", what)

    def integer(digits: str) -> int:
        check_limit(len(digits), "JSON_DIGITS", what)
        return int(digits)

    # called for each integer: only where there is a run of more digits than may be
    return json.loads(text, parse_int=integer if re.search(rf"\d{{{limit('JSON_DIGITS')}}}", text) else None)


def _depth(text: str) -> int:
    """How deep lists and objects lie inside each other; strings may hold brackets of their own."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest
