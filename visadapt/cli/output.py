"""Printing to the terminal."""

from __future__ import annotations

import sys
from typing import Any

from visadapt.optional import require
from visadapt.printable import printable


def show(table: Any) -> None:
    """Print a table: drawn by rich on a terminal, as plain uncut text otherwise."""
    if sys.stdout.isatty():
        require("rich.console", "a table in colour", "visadapt[cli]").Console().print(table)
    else:
        print(table)


def say(text: str) -> None:
    """Print to standard error, apart from the command's output, with control characters escaped."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)
