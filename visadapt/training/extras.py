"""Libraries that come with an extra of visadapt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from visadapt.errors import VisadaptError


def optional(module: str, what: str, extra: str = "train") -> Any:
    """A library's module.

    Args:
        module: its name.
        what: needs it, in words.
        extra: of visadapt, that brings it.

    Raises:
        VisadaptError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise VisadaptError(f"{what} needs {library}: pip install 'visadapt[{extra}]'") from error
