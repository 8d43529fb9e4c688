"""The command line ``visadapt``: what the library does, on files."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; the entry point of the console script."""
    try:
        from visadapt.cli.app import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("the command line needs typer and rich: pip install 'visadapt[cli]'")
    app()
