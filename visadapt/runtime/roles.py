"""How a task's parts act at a host: before, instead, beside or after its own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import CHILD


def role(part: nn.Module) -> str:
    """How a part acts at its host; its class says so, and one that says nothing stands ``"instead"`` of it.

    * before: called with the host's arguments; the tuple it returns takes their place;
    * weights: called with a dict of the host's parameters; the host computes with those it returns, by dotted name;
    * instead: called with the host's arguments, and the host's own forward is not;
    * beside: called with the host's first argument; its result is added to the host's output;
    * after: called with the host's output; its result takes that one's place.
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
    """The host's own forward, with the task's weights where it has some, or what stands instead of it."""
    weights = None
    for part in parts.values():
        if role(part) == "instead":
            return part(*args, **kwargs)
        if role(part) == "weights":
            weights = part(host._parameters if weights is None else {**host._parameters, **weights})
    if weights is None:
        return plain.forward(host, *args, **kwargs)
    if torch.compiler.is_compiling() and any("." in name for name in weights):
        # dynamo knows what a module's child is of that it has seen, and not what a shadow's is
        with swapped(host, weights):
            return plain.forward(host, *args, **kwargs)
    return plain.forward(with_weights(host, plain, weights), *args, **kwargs)


def around(part: nn.Module, out: Any, args: Any) -> Any:
    """What a part makes of the host's output, if it acts on that at all."""
    if role(part) == "beside":
        return on_tensor(out, lambda y: y + part(args[0]))
    return on_tensor(out, part) if role(part) == "after" else out


def with_weights(host: nn.Module, cls: type[nn.Module], weights: Mapping[str, Tensor | None]) -> nn.Module:
    """A shadow of the host that computes with other weights; it lives for one forward, so threads do not meet in it.

    Args:
        host: a module; its children are shadowed too where ``weights`` names parameters of theirs.
        cls: class of the shadow, whose forward will run.
        weights: parameters by dotted name; those that are not named are the host's own.
    """
    own = {name: _like(host._parameters.get(name), value) for name, value in weights.items() if "." not in name}
    inner: dict[str, dict[str, Tensor | None]] = {}
    for name, value in weights.items():
        child, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = value
    modules = dict(host._modules)
    if cls is not type(host):
        # to a class without parts these are a child like others, which a Sequential would call
        modules.pop(CHILD, None)
    for name, theirs in inner.items():
        child_module = cast("nn.Module", modules[name])
        modules[name] = with_weights(child_module, type(child_module), theirs)
    shadow = cls.__new__(cls)
    changed = {"training": host.training, "_parameters": {**host._parameters, **own}, "_modules": modules}
    shadow.__dict__ = {**host.__dict__, **changed}
    return shadow


@contextmanager
def swapped(host: nn.Module, weights: Mapping[str, Tensor | None]) -> Iterator[None]:
    """The same by other means, for a graph being made: the host's own parameters are changed, and changed back."""
    places = [(host.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights]
    own = [module._parameters[name] for module, name in places]
    try:
        for (module, name), value, before in zip(places, weights.values(), own, strict=True):
            module._parameters[name] = cast("Any", _like(before, value))
        yield
    finally:
        for (module, name), before in zip(places, own, strict=True):
            module._parameters[name] = before


def _like(own: Tensor | None, value: Tensor | None) -> Tensor | None:
    # a task's fp32 weights beside a half-precision backbone
    return value if own is None or value is None else value.to(own.dtype)


def on_tensor(out: Any, function: Any) -> Any:
    """Apply ``function`` to a module's output, or to its first element where the output is a tuple.

    What stands for a tensor counts as one, such as a proxy of torch.fx.
    """
    if hasattr(type(out), "__torch_function__"):
        return function(out)
    return (function(out[0]), *out[1:])
