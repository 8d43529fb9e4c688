"""Forwards that were assigned to single modules: a copy of the model may still run the original by them."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.modules import FORWARDS, own_modules
from visadapt.errors import VisadaptError
from visadapt.runtime.forwards import holds


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
    originals = set(own_modules(source).values())
    for path, module in own_modules(copied).items():
        forwards = (module.__dict__.get("forward"), *module.__dict__.get(FORWARDS, ()))
        if any(holds(forward, originals) for forward in forwards):
            raise VisadaptError(
                f"{path or type(module).__name__} has a forward of its own, a function that runs this model and not a "
                "copy of it: a merged model would still depend on the tasks of this one. Delete that forward, or "
                "write it into the module's class"
            )
