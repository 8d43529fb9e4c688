"""How a task's parts act at a host: before, instead, beside or after its own forward, or watching it."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

AROUND = ("beside", "after", "watch")
"""The roles of parts that act once the host's output is there."""


def role(part: nn.Module) -> str:
    """How a part acts at its host; its class says so, and one that says nothing stands ``"instead"`` of it.

    * before: called with the host's arguments; the tuple it returns takes their place;
    * weights: called with a dict of some of the host's own parameters, by name; those it returns take their place
      wherever they are read (see `visadapt.runtime.weights`);
    * instead: called with the host's arguments, and the host's own forward is not;
    * beside: called with the host's first argument; its result is added to the host's output;
    * after: called with the host's output; its result takes that one's place;
    * watch: called with the host's output, which stays what it is.
    """
    return cast("str", getattr(type(part), "role", "instead"))


def run(host: nn.Module, plain: type[nn.Module], parts: nn.ModuleDict, args: Any, kwargs: Any) -> Any:
    """One task's forward at one host: first what changes its input, then it or what stands instead, then the others."""
    for part in parts.values():
        if role(part) == "before":
            args = part(*args)
    out = core(host, plain, parts, args, kwargs)
    for part in parts.values():
        out = around(part, out, args)
    return out


def core(host: nn.Module, plain: type[nn.Module], parts: nn.ModuleDict, args: Any, kwargs: Any) -> Any:
    """The host's own forward, or what stands instead of it."""
    for part in parts.values():
        if role(part) == "instead":
            return part(*args, **kwargs)
    return plain.forward(host, *args, **kwargs)


def around(part: nn.Module, out: Any, args: Any) -> Any:
    """What a part makes of the host's output, if it acts on that at all."""
    acts = role(part)
    if acts == "beside":
        return on_tensor(out, lambda y: y + part(args[0]))
    if acts == "watch":
        on_tensor(out, part)
    return on_tensor(out, part) if acts == "after" else out


def on_tensor(out: Any, function: Any) -> Any:
    """Apply ``function`` to a module's output, or to its first element where the output is a tuple.

    What stands for a tensor counts as one, such as a proxy of torch.fx.
    """
    if hasattr(type(out), "__torch_function__"):
        return function(out)
    return (function(out[0]), *out[1:])
