"""How a task's parts act at a host: before, instead, beside or after its own forward, or watching it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.batch import with_first
from visadapt.methods.layers import is_hooked

AROUND = ("beside", "after", "watch")
"""The roles of parts that act once the host's output is there."""

_MAKERS = frozenset(layer.forward for layer in (nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, _BatchNorm))
"""Forwards whose output nothing else holds."""


def role(part: nn.Module) -> str:
    """How a part acts at its host, as its class states; the default is ``"instead"``.

    * before: called with the host's arguments; the tuple it returns replaces them;
    * weights: called with a dict of some of the host's own parameters, by name; those it returns replace them
      wherever they are read (see `visadapt.runtime.weights`);
    * instead: called with the host's arguments, and the host's own forward is not;
    * beside: called with the host's first argument; its result is added to the host's output;
    * after: called with the host's output; its result replaces it;
    * watch: called with the host's output, which it does not change.
    """
    found: str = getattr(type(part), "role", "instead")
    return found


def run(host: nn.Module, plain: type[nn.Module], parts: nn.ModuleDict, args: Any, kwargs: Any) -> Any:
    """One task's forward at one host: parts that change its input, then it or its replacement, then the others."""
    instead: Any = None
    others: list[nn.Module] = []
    watched = False
    # this runs at every host of every forward, so it passes over the parts once
    own: Any = parts._modules.values()
    for part in own:
        how = role(part)
        if how == "before":
            args = part(*args)
        elif how == "instead":
            instead = part if instead is None else instead
        else:
            others.append(part)
            watched = watched or how == "watch"
    out = plain.forward(host, *args, **kwargs) if instead is None else instead(*args, **kwargs)
    if others:
        fresh = not watched and is_fresh(plain, instead)
        for part in others:
            out = around(part, out, args, fresh)
    return out


def core(host: nn.Module, plain: type[nn.Module], parts: nn.ModuleDict, args: Any, kwargs: Any) -> Any:
    """The host's own forward, or the part that replaces it."""
    for part in parts.values():
        if role(part) == "instead":
            return part(*args, **kwargs)
    return plain.forward(host, *args, **kwargs)


def is_fresh(plain: type[nn.Module], instead: nn.Module | None = None) -> bool:
    """Whether nothing else holds a host's output, so that a part may overwrite it.

    That is so without autograd, at a layer of torch's own whose output no hook was shown.

    Args:
        plain: the host's class.
        instead: what computes the output instead of the host, if anything does.
    """
    if torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if instead is None:
        return plain.forward in _MAKERS
    return type(instead).forward in _MAKERS and not is_hooked(instead)


def around(part: nn.Module, out: Any, args: Any, fresh: bool = False) -> Any:
    """Apply a part to the host's output, if it acts on it."""
    how = role(part)
    if how == "beside":
        return on_tensor(out, lambda y: y + part(args[0]))
    if how == "watch":
        on_tensor(out, part)
    if how != "after":
        return out
    if fresh and type(out) is Tensor and getattr(type(part), "overwrites", False) and not is_hooked(part):
        return part(out, fresh=True)
    return on_tensor(out, part)


def on_tensor(out: Any, function: Any) -> Any:
    """Apply ``function`` to a module's output, or to its first element where the output is a tuple, list or mapping.

    What stands for a tensor counts as one, such as a proxy of torch.fx.
    """
    if hasattr(type(out), "__torch_function__"):
        return function(out)
    return with_first(out, lambda _, first: function(first))
