"""The one error that visadapt raises, and the hint it carries."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VisadaptError(ValueError):
    """Says what was wrong with a request and, where there is one, the nearest right thing.

    It is raised before anything was changed: the model, the task and the file are as they were.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'flowers'?"`` or, where nothing is near, what there is.

    Args:
        name: what was asked for.
        names: what exists.

    Returns:
        Text to append to an error message; empty if ``names`` is empty.
    """
    known = sorted({str(n) for n in names})
    close = get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"; there is: {shown}"
