"""What takes part in a forward beside the classes of a model's modules: forwards and hooks given to single modules.

Which rows belong to which sample is found on a copy of the backbone. Hooks that only look must not see that run, so the
copy has none of them. A hook that replaces what it is shown takes part in the forward, and the copy has it too. Which
one does is seen when it does so for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules import module as module_hooks

from visadapt.backbone.modules import FORWARDS

_REPLACING: WeakSet[Any] = WeakSet()
"""Functions (and classes of callable objects) of hooks that once replaced what they were shown."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def function_of(hook: Any) -> Any:
    """Return the function of a hook, which all its copies and bound methods share; of other objects their class."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    return hook if isinstance(hook, FunctionType) else type(hook)


def replaces(hook: Callable[..., Any]) -> bool:
    """Return whether a hook is known to replace what it is shown."""
    return function_of(hook) in _REPLACING


def note_replacing(hook: Callable[..., Any]) -> None:
    """Keep in mind that a hook replaces what it is shown."""
    _REPLACING.add(function_of(hook))


def count_replacing() -> int:
    """Return how many hooks are known to replace what they are shown."""
    return len(_REPLACING)


def added(modules: Mapping[str, nn.Module]) -> tuple[list[Any], list[nn.Module]]:
    """Return what was added to modules.

    Returns:
        a list that is equal as long as the same forwards and hooks take part, and the modules with any hooks.
    """
    found: list[Any] = [*module_hooks._global_forward_hooks, *module_hooks._global_forward_pre_hooks]
    hooked = []
    for path, module in modules.items():
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            hooked.append(module)
            keys = [key for name in HOOKS for key, hook in own[name].items() if replaces(hook)]
            found += [(path, keys)] if keys else []
        if "forward" in own or FORWARDS in own:
            found.append((path, own.get("forward"), own.get(FORWARDS)))
    return found, hooked
