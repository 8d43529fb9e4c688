"""Libraries that some features need and the core does not."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from visadapt.errors import VisadaptError


def available(module: str) -> bool:
    """Whether a library is installed."""
    return find_spec(module) is not None


def require(module: str, purpose: str, install: str) -> Any:
    """Import a library that an optional feature needs.

    Args:
        module: dotted name of the module to import.
        purpose: what needs it, as the beginning of the error message.
        install: what to give ``pip install``, such as ``"visadapt[train]"``.

    Returns:
        The module.

    Raises:
        VisadaptError: the library is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = (error.name or module).partition(".")[0]
        wanted = f"'{install}'" if "[" in install else install
        raise VisadaptError(f"{purpose} needs {library}: pip install {wanted}") from error
