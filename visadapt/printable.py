"""Text of any origin, shown so that it cannot act on a terminal or a page."""

from __future__ import annotations

import json
import re
from typing import Any

# C0 and C1 control characters, line separators, marks that reverse the direction of text, and the surrogates that
# stand for bytes of a file name that are not UTF-8
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_MARKUP = re.compile(r"[<>\[\]|]")

_ENTITIES = {"<": "&lt;", ">": "&gt;"}


def printable(text: object) -> str:
    r"""Show control characters as escapes, so that text from a file cannot move a cursor or break a line.

    Args:
        text: anything; its ``str`` is taken.

    Examples:
        >>> from visadapt.printable import printable
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def shown(value: object, length: int = 200) -> str:
    """Show a value in a message: at most so much of it, without control characters, whatever its ``repr`` does.

    Args:
        value: anything; one that has no ``repr``, or is too deep for one, is shown by its type.
        length: characters at which it is cut off.

    Examples:
        >>> from visadapt.printable import shown
        >>> shown("a" * 20, 12)
        "'aaaaaaaa…"
    """
    try:
        text = repr(value)
    except Exception:  # of a stranger's class; RecursionError; and an int may have too many digits
        return f"a {type(value).__name__}"
    return printable(text if len(text) <= length else f"{text[: length - 3]}…")


def printable_json(value: Any) -> str:
    """JSON on one line, readable in any language, with control characters and lone surrogates as escapes.

    Args:
        value: JSON values.
    """
    text = json.dumps(value, ensure_ascii=False)
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def markdown_text(text: object) -> str:
    r"""Escape what would be a tag, a link or a column in Markdown; emphasis is kept.

    Args:
        text: anything; its ``str`` is taken.

    Examples:
        >>> from visadapt.printable import markdown_text
        >>> markdown_text("<b> [a](b)")
        '&lt;b&gt; \\[a\\](b)'
    """
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), printable(text))
