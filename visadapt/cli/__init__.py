"""The ``visadapt`` command line."""

from __future__ import annotations

import sys
from importlib import import_module
from io import TextIOWrapper

from visadapt.errors import VisadaptError
from visadapt.optional import require


def main() -> None:
    """Run the command line; the entry point of the console script."""
    try:
        for library in ("typer", "rich"):
            require(library, "the command line", "visadapt[cli]")
    except VisadaptError as error:
        sys.exit(str(error))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # a terminal of another encoding shows escapes
            stream.reconfigure(errors="backslashreplace")
    import_module("visadapt.cli.app").app()
