"""Hosts that run, count or list their children: the child that holds the parts of tasks is not one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import update_wrapper
from types import FunctionType
from typing import Any

import torch
from torch import nn

from visadapt.backbone.modules import CHILD
from visadapt.backbone.subclass import ModuleClass, cached, subclass

_READERS: dict[ModuleClass, tuple[str, ...]] = {
    nn.Sequential: ("__iter__", "__len__", "__getitem__"),
    nn.ModuleList: ("__iter__", "__len__", "__getitem__"),
    nn.ModuleDict: ("__iter__", "__len__", "__contains__", "keys", "values", "items"),
}
"""The methods by which torch's containers are read."""

_LISTERS = {"children", "named_children", "modules", "named_modules", "_modules"}

_RUNNING: ContextVar[tuple[int, ...]] = ContextVar("visadapt_running", default=())


def container_members(plain: ModuleClass) -> dict[str, Any]:
    """The members of a hosting class by which a container of torch's reads its children, and no parts."""
    base = next((base for base in _READERS if issubclass(plain, base)), None)
    return {} if base is None else {name: _reader(plain, name) for name in _READERS[base]}


def _reader(plain: ModuleClass, name: str) -> Callable[..., Any]:
    if name == "__iter__" and not issubclass(plain, nn.ModuleDict):
        # simple, since torch.compile traces it in a forward
        return lambda self: (child for key, child in self._modules.items() if key != CHILD)
    if name == "__len__":
        return lambda self: sum(key != CHILD for key in self._modules)

    def read(self: nn.Module, *args: Any) -> Any:
        return getattr(plain, name)(_without_parts(self, plain), *args)

    return read


def _without_parts(host: nn.Module, plain: ModuleClass) -> nn.Module:
    """A stand-in for a host, to read its children from."""
    view = plain.__new__(plain)
    view.__dict__ = {**host.__dict__, "_modules": _own_children(host)}
    return view


def _own_children(host: nn.Module) -> dict[str, nn.Module | None]:
    return {name: child for name, child in host.__dict__["_modules"].items() if name != CHILD}


def lists_children(plain: ModuleClass) -> bool:
    """Whether the code of a class, except torch's own containers, names an attribute that lists a module's children."""
    functions = [
        function
        for cls in plain.__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module and cls not in _READERS
        for function in vars(cls).values()
    ]
    return any(_names(function.__code__) & _LISTERS for function in functions if isinstance(function, FunctionType))


def _names(code: Any) -> set[str]:
    inner = [_names(const) for const in code.co_consts if hasattr(const, "co_names")]
    return set(code.co_names).union(*inner)


@cached
def listing_class(plain: ModuleClass) -> ModuleClass:
    """A subclass that lists no parts among its children while its own forward runs.

    For everything else (``.to()``, ``state_dict``, FSDP) they are an ordinary child.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return plain.forward(self, *args, **kwargs)
        token = _RUNNING.set((*_RUNNING.get(), id(self)))
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            _RUNNING.reset(token)

    def get(self: nn.Module) -> Any:
        runs = torch.compiler.is_dynamo_compiling() or id(self) in _RUNNING.get()
        return _own_children(self) if runs else self.__dict__["_modules"]

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__["_modules"] = value

    members = {"forward": update_wrapper(forward, plain.forward), "_modules": property(get, put)}
    return subclass(plain, listing_class, **members)
