"""A progress bar where rich is installed and someone is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]


@contextmanager
def bar(total: int, title: str, wanted: bool, done: int = 0) -> Iterator[Advance]:
    """A bar of ``total`` steps on standard error, ``done`` of them; a function to call after each, with words to show.

    Without rich, without a terminal or unwanted, that function does nothing.
    """
    if wanted and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            pass
        else:
            # words come from users' texts, in which brackets are no markup
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}", markup=False),
            )
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                shown = progress.add_task(title, total=total, completed=done, words="")
                yield lambda words: progress.update(shown, advance=1, words=words)
            return
    yield lambda words: None
