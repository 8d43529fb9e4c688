"""A progress bar, if rich is installed and standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visadapt.optional import available, require

Advance = Callable[[str], None]


@contextmanager
def bar(total: int, title: str, show: bool, done: int = 0) -> Iterator[Advance]:
    """Show a bar of ``total`` steps, ``done`` of them finished, on standard error.

    Yields:
        A function to call after each step with a text to display; it does nothing if ``show`` is False, rich is not
        installed or standard error is not a terminal.
    """
    if show and sys.stderr.isatty() and available("rich"):
        rich = require("rich.progress", "a progress bar", "visadapt[train]")
        # no markup: titles and texts come from the user and may contain brackets
        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[text]}", markup=False),
        )
        console = require("rich.console", "a progress bar", "visadapt[train]").Console(stderr=True)
        with rich.Progress(*columns, console=console, transient=True) as progress:
            row = progress.add_task(title, total=total, completed=done, text="")
            yield lambda text: progress.update(row, advance=1, text=text)
        return
    yield lambda text: None
