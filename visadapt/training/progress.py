"""A progress bar where rich is installed and someone is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from visadapt.optional import available, require

Advance = Callable[[str], None]


@contextmanager
def bar(total: int, title: str, wanted: bool, done: int = 0) -> Iterator[Advance]:
    """A bar of ``total`` steps on standard error, ``done`` of them; a function to call after each, with words to show.

    Without rich, without a terminal or unwanted, that function does nothing.
    """
    if wanted and sys.stderr.isatty() and available("rich"):
        rich = require("rich.progress", "a progress bar", "visadapt[train]")
        # words come from users' texts, in which brackets are not markup
        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[words]}", markup=False),
        )
        console = require("rich.console", "a progress bar", "visadapt[train]").Console(stderr=True)
        with rich.Progress(*columns, console=console, transient=True) as progress:
            shown = progress.add_task(title, total=total, completed=done, words="")
            yield lambda words: progress.update(shown, advance=1, words=words)
        return
    yield lambda words: None
