"""The ``visadapt`` command, outside of the package, whose import takes seconds: ready for Ctrl-C before it begins."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""Exit code, as a shell gives it for a process that the signal ended."""


def end(*_: Any) -> NoReturn:
    """End the process without a traceback, for SIGINT while there is nothing to clean up."""
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    # a program that a shell started in the background ignores the signal, and goes on doing so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    import_module("visadapt.cli").main()
