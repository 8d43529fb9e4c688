"""Forwards that were assigned to single modules: a copy of the model may still run the original by them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from visadapt.backbone.modules import FORWARDS, own_modules
from visadapt.errors import VisadaptError

DEPTH = 6
"""How far functions are followed into what they hold."""


def check_copied(source: nn.Module, copied: nn.Module) -> None:
    """Refuse a copy with a forward that runs modules of the original.

    ``copy.deepcopy`` copies methods and partial functions with the modules that they hold, and functions not: a
    closure, or an argument's default, stays bound to the original.

    Args:
        source: the original.
        copied: the copy.

    Raises:
        VisadaptError: there is such a forward; its module is named.
    """
    originals = {id(module) for module in own_modules(source).values()}
    for path, module in own_modules(copied).items():
        forwards = (module.__dict__.get("forward"), *module.__dict__.get(FORWARDS, ()))
        if any(_holds(forward, originals) for forward in forwards):
            raise VisadaptError(
                f"{path or type(module).__name__} has a forward of its own, a function that runs this model and not a "
                "copy of it: a merged model would still depend on the tasks of this one. Delete that forward, or "
                "write it into the module's class"
            )


def _holds(value: Any, originals: set[int], depth: int = DEPTH) -> bool:
    held: tuple[Any, ...] = ()
    if isinstance(value, nn.Module):
        return id(value) in originals
    if isinstance(value, MethodType):
        held = value.__self__, value.__func__
    elif isinstance(value, partial):
        held = value.func, *value.args, *value.keywords.values()
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held = *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
    elif isinstance(value, Mapping):
        held = tuple(value.values())
    elif isinstance(value, list | tuple):
        held = tuple(value)
    return depth > 0 and any(_holds(each, originals, depth - 1) for each in held)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
