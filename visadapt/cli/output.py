"""What commands print."""

from __future__ import annotations

import sys
from typing import Any

from visadapt.optional import require


def show(table: Any) -> None:
    """Prints a table: drawn by rich on a terminal, plain and uncut where the output goes elsewhere."""
    if sys.stdout.isatty():
        require("rich.console", "a table in colour", "visadapt[cli]").Console().print(table)
    else:
        print(table)


def say(text: str) -> None:
    """A line for the reader, beside what the command gives."""
    print(text, file=sys.stderr)
