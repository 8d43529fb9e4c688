"""The ``visadapt`` command line."""

from __future__ import annotations

import os
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
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # a terminal of another encoding shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        import_module("visadapt.cli.app").app()
    except KeyboardInterrupt:
        # while the commands are imported and built; a running command says what became of its files
        sys.exit(130)


def _open_streams() -> None:
    """Open the standard streams that are closed, so that no file takes their place.

    Standard output is opened so that writing to it fails: it must not be lost in silence.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
