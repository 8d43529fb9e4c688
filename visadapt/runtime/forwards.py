"""Forwards that belong to one module, not to its class: accelerate's hooks, patched attention, autocast wrappers.

Such a forward is an attribute of the module, which Python finds before that of any class. A host stores it elsewhere
and calls it as its own forward, so that a task's parts act around it, whether it was set before the parts or later.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial, update_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from visadapt.backbone.modules import FORWARDS, joined, own_modules
from visadapt.backbone.subclass import ModuleClass, cached, is_made_by, made_by, subclass
from visadapt.errors import VisadaptError

DEPTH = 6
"""How far functions are followed into what they hold."""


@cached
def given_class(plain: ModuleClass) -> ModuleClass:
    """A subclass whose forward is the one that was given to the module itself."""
    level = count_given(plain)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[FORWARDS][level](*args, **kwargs)

    return subclass(plain, given_class, forward=update_wrapper(forward, plain.forward))


def count_given(cls: ModuleClass) -> int:
    """Number of nested forwards that a module of this class was given."""
    return sum(is_made_by(make, (given_class,)) for make in made_by(cls))


def forward_of(module: nn.Module) -> Any:
    """The forward that was assigned to a module itself, or None."""
    given = module.__dict__.get(FORWARDS)
    return given[-1] if given else module.__dict__.get("forward")


def check_loaded(modules: dict[str, nn.Module]) -> None:
    """Refuse a backbone whose weights are offloaded until a module's own forward fetches them.

    Raises:
        VisadaptError: a module's weights are offloaded.
    """
    for path, module in modules.items():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if forward_of(module) is not None and any(t is not None and t.is_meta for t in tensors):
            raise VisadaptError(
                f"the weights of {path or type(module).__name__} are offloaded: a forward of its own fetches them from "
                "elsewhere. Inject first, then offload"
            )


def detach_copy(part: nn.Module, original: nn.Module, path: str) -> None:
    """Bind the forwards that a copy took over from the module it was copied from to the copy.

    Args:
        part: the copy.
        original: what it was copied from; modules of the same names within are copies of each other.
        path: of the original, for the message.

    Raises:
        VisadaptError: such a forward is a function that refers to the original, which a copy cannot change.
    """
    originals = own_modules(original)
    for name, inner in part.named_modules():
        source = originals.get(name)
        if "forward" not in inner.__dict__ or source is None:
            continue
        bound = {key: value for key, value in inner.__dict__.items() if isinstance(value, MethodType | partial)}
        inner.__dict__.update(copy.deepcopy(bound, {id(source): inner, id(inner): inner}))
        if holds(inner.__dict__["forward"], set(originals.values())):
            raise VisadaptError(
                f"{joined(path, name) or type(source).__name__} has a forward of its own, a function "
                "that no copy of the module can have: a task cannot train a copy of it (norms='frozen' and "
                "head='frozen' need none)"
            )


def holds(value: Any, modules: Collection[nn.Module], depth: int = DEPTH) -> bool:
    """Whether a function is bound to one of these modules, closes over one or has one among its arguments' defaults."""
    held: tuple[Any, ...] = ()
    if isinstance(value, nn.Module):
        return value in modules
    if isinstance(value, MethodType):
        held = value.__self__, value.__func__
    elif isinstance(value, partial):
        held = value.func, *value.args, *value.keywords.values()
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        held = *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
    elif isinstance(value, Mapping):
        held = tuple(value.values())
    elif isinstance(value, list | tuple):
        held = tuple(value)
    return depth > 0 and any(holds(each, modules, depth - 1) for each in held)


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
