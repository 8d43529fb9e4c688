"""Weights that belong to a task: reading a host's parameter returns the active task's value.

The class of a host has a property for each parameter that some task replaces. While that task is active,
``module.weight`` returns the task's tensor: in the module's own forward, in a parent that reads a child's weight
without calling the child (as ``nn.MultiheadAttention`` does), and in any other code. The module itself is not changed,
so threads do not interfere: ``_parameters`` and the state dict always hold the backbone's values.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import update_wrapper
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import CHILD, joined
from visadapt.backbone.subclass import plain_class
from visadapt.backbone.tracing import is_symbolic_tracing
from visadapt.errors import VisadaptError
from visadapt.runtime.choice import AUTO
from visadapt.runtime.division import UnfitError
from visadapt.runtime.registry import Parts
from visadapt.runtime.roles import role
from visadapt.runtime.symbolic import traced_weight

KEPT = "_visadapt_kept"
"""Attribute of a part: what its host keeps in tables while the part's task is active."""

_OF_MODULES = frozenset(vars(nn.Module()))


def owned_members(plain: type[nn.Module], names: Iterable[str], tables: Iterable[str] = ()) -> dict[str, Any]:
    """Return the properties that replace parameters in the class of a host.

    Args:
        plain: the host's class.
        names: names of the host's own parameters.
        tables: names of its tables of tensors; see `tensor_tables`.
    """
    members: dict[str, Any] = {name: _owned(name) for name in names} | {name: _table(name) for name in tables}
    if members:
        members["register_parameter"] = _registering(plain)
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


def tensor_tables(host: nn.Module) -> tuple[str, ...]:
    """Return the names of the attributes in which a host may keep tensors computed from its parameters.

    Some attention layers, as LeViT's, compute their biases once in eval mode and keep them in a dict. What a task's
    weights gave must not be read for another.
    """
    return tuple(
        sorted(
            name
            for name, value in host.__dict__.items()
            if type(value) is dict and name not in _OF_MODULES and all(isinstance(v, Tensor) for v in value.values())
        )
    )


def _table(name: str) -> property:
    def get(self: nn.Module) -> Any:
        try:
            kept = self.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None
        parts = self.__dict__["_modules"].get(CHILD)
        task = None if parts is None else parts._registry.acting()
        if parts is None or task is None or type(kept) is not dict:
            return kept
        tasks = tuple(parts) if task == AUTO else task if isinstance(task, tuple) else (task,)
        changing = {None if each is None else _changing(parts, each) for each in tasks}
        if len(changing) > 1:
            # several values: reading the parameter itself is refused
            return {}
        part = changing.pop()
        return kept if part is None else _table_of(part, name)

    def put(self: nn.Module, value: Any) -> None:
        # the tables of all tasks, as when the mode changes
        parts = self._modules.get(CHILD)
        for part in () if parts is None else parts.modules():
            part.__dict__.get(KEPT, {}).pop(name, None)
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        put(self, None)
        del self.__dict__[name]

    return property(get, put, delete)


def _table_of(part: nn.Module, name: str) -> dict[Any, Any]:
    """Return a part's table; an empty one if its weights have changed since, which another task's table cannot tell."""
    state = tuple(None if value.is_inference() else value._version for value in part.parameters())
    tables: dict[str, Any] = part.__dict__.setdefault(KEPT, {})
    if name not in tables or tables[name][0] != state:
        tables[name] = state, {}
    return cast("dict[Any, Any]", tables[name][1])


# as torch.compiler.disable does, which imports dynamo: what is kept for later calls is not a part of a graph
_table_of.__dict__["_torchdynamo_disable"] = True


def check_kept(host: nn.Module, name: str) -> None:
    """Refuse to remove a parameter that some task has a value of its own for.

    Args:
        host: the module.
        name: of an attribute that is to be deleted.

    Raises:
        VisadaptError: it is such a parameter.
    """
    if name in host._parameters and name in host._visadapt_owned:  # type: ignore[operator]
        raise moved(host, name)


def moved(host: nn.Module, name: str) -> VisadaptError:
    """Return the error for a parameter that was replaced while some task has a value of its own for it."""
    parts = cast("Parts", host._modules[CHILD])
    task = next((task for task in parts if changes(parts, task)), None)
    return VisadaptError(
        f"{joined(parts._path, name)} cannot be pruned, normalised or parametrized, nor freed of that: task {task!r} "
        "has a value of its own for it, which the backbone would get if that task is active. Do it before inject, or "
        "on a copy from visadapt.merge(model, task); if it is done already, load the backbone's weights again"
    )


def _registering(plain: type[nn.Module]) -> Any:
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        parts = self.__dict__["_modules"].get(CHILD)
        if parts is not None and name not in self._parameters:
            # torch's functions that replace a parameter read it, and so may have the active task's
            owned = cast("tuple[str, ...]", self._visadapt_owned)
            gone = [own for own in owned if own not in self._parameters]
            active = parts._registry.current()
            tasks = active if isinstance(active, tuple) else (active,)
            own = any(param is value for part in parts.modules() for value in part._parameters.values())
            if param is not None and (own or (gone and any(t in parts and changes(parts, t) for t in tasks))):
                raise moved(self, gone[0] if gone else name.removesuffix("_orig"))
        plain.register_parameter(self, name, param)

    return update_wrapper(register_parameter, plain.register_parameter)


def check_there(host: nn.Module) -> None:
    """Refuse a host without a parameter that some task has a value of its own for.

    Raises:
        VisadaptError: there is such a parameter.
    """
    for name in getattr(host, "_visadapt_owned", ()):
        if name not in host._parameters and name not in host.__dict__:
            raise moved(host, name)


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
    return _changing(parts, task) is not None


def _changing(parts: Parts, task: str) -> nn.Module | None:
    """Return the first part of a task that replaces weights of a host; None if there is none."""
    own = parts._of(task)
    return None if own is None else next((part for part in own.values() if role(part) == "weights"), None)


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
