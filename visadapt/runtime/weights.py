"""Weights that belong to a task: reading a host's parameter returns the active task's value.

The class of a host has a property for each parameter that some task replaces. While that task is active,
``module.weight`` returns the task's tensor: in the module's own forward, in a parent that reads a child's weight
without calling the child (as ``nn.MultiheadAttention`` does), and in any other code. The module itself is not changed,
so threads do not interfere: ``_parameters`` and the state dict always hold the backbone's values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import CHILD
from visadapt.backbone.subclass import plain_class
from visadapt.backbone.tracing import is_symbolic_tracing
from visadapt.runtime.choice import AUTO
from visadapt.runtime.division import UnfitError
from visadapt.runtime.registry import Parts
from visadapt.runtime.roles import role
from visadapt.runtime.symbolic import traced_weight


def owned_members(plain: type[nn.Module], names: Iterable[str]) -> dict[str, Any]:
    """Return the properties that replace parameters in the class of a host.

    Args:
        plain: the host's class.
        names: names of the host's own parameters.
    """
    members: dict[str, Any] = {name: _owned(name) for name in names}
    if members and issubclass(plain, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, _set_flat_weights)
        members["flatten_parameters"] = _flatten_parameters
    return members


def _owned(name: str) -> property:
    def get(self: nn.Module) -> Any:
        own = _held(self, name)
        parts = self.__dict__["_modules"].get(CHILD)
        if parts is not None and not torch.compiler.is_dynamo_compiling() and is_symbolic_tracing():
            proxy = traced_weight(self, parts, name)
            if proxy is not None:
                return proxy
        return own if parts is None else _meant(self, cast("Parts", parts), name, own)

    def put(self: nn.Module, value: Any) -> None:
        # DataParallel's replicas and weight normalisation set a plain tensor in place of the parameter
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return property(get, put, delete)


def _held(module: nn.Module, name: str) -> Any:
    """Return the backbone's value of a parameter.

    Raises:
        AttributeError: the module no longer has such a parameter; ``nn.Module`` then looks among buffers and children.
    """
    if name in module._parameters:
        return module._parameters[name]
    if name in module.__dict__:
        return module.__dict__[name]
    raise AttributeError(name)


def _meant(host: nn.Module, parts: Parts, name: str, own: Any) -> Any:
    """Return the value of a parameter for the active task."""
    task = parts._registry.acting()
    if task == AUTO:
        # the decider has not chosen tasks for this batch yet: any task is possible
        task = (None, *parts)
    if not isinstance(task, tuple):
        return own if task is None else _changed(parts, task, name, own)
    # tasks without own weights here use the backbone's
    tasks = {each if each is not None and changes(parts, each) else None for each in task}
    if len(tasks) == 1:
        task = tasks.pop()
        return own if task is None else _changed(parts, task, name, own)
    undecided = cast("Tensor", own.detach()).as_subclass(Undecided)
    undecided.host, undecided.name_ = type(host).__name__, name
    return undecided


def changes(parts: Parts, task: str) -> bool:
    """Return whether a task replaces weights of a host."""
    own = parts._of(task)
    return own is not None and any(role(part) == "weights" for part in own.values())


def _changed(parts: Parts, task: str, name: str, own: Any) -> Any:
    value = own
    held = parts._of(task)
    if held is None:
        parts._registry.check_current()
    for part in () if held is None else held.values():
        if role(part) == "weights":
            value = part({name: value}).get(name, value)
    # tasks keep fp32 weights, also on a half-precision backbone
    return value if value is own or own is None else value.to(own.dtype)


_LOOKS = {
    getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta", "layout", "requires_grad")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size}


class Undecided(Tensor):
    """A parameter read in a mixed batch whose tasks have different values; only shape and dtype can be read."""

    host: str
    name_: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        self = next(arg for arg in args if isinstance(arg, Undecided))
        raise UnfitError(
            f"in a mixed batch, the {self.name_} of a {self.host} was used without calling the module, and its tasks "
            "have different ones: run each task's samples alone"
        )


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    """Return the parameters that an RNN passes to its kernel, which it keeps in a list of its own."""
    kept = cast("list[Tensor]", self.__dict__["_flat_weights"])
    now = [getattr(self, name, None) for name in self._flat_weights_names]
    return kept if all(a is b for a, b in zip(kept, now, strict=True)) else cast("list[Tensor]", now)


def _set_flat_weights(self: nn.RNNBase, value: Any) -> None:
    names = self._flat_weights_names
    self.__dict__["_flat_weights"] = [self._parameters.get(name, self.__dict__.get(name)) for name in names]


def _flatten_parameters(self: nn.RNNBase) -> None:
    # called by every copy and move, also while a mixed batch is active
    if not any(isinstance(weight, Undecided) for weight in self._flat_weights):
        plain_class(self).flatten_parameters(self)  # type: ignore[attr-defined]
