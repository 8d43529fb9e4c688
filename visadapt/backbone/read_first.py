"""Attributes that a forward, or a call of one module, reads before it sets them: an earlier one may steer a later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def reads_first(
    modules: Mapping[str, nn.Module], labels: Iterable[tuple[str, str]], each_call: bool = False
) -> Iterator[set[tuple[str, str]]]:
    """Collect the attributes that are read in this block before they are set.

    Args:
        modules: by path.
        labels: paths of modules and names of their attributes.
        each_call: whether each call of a module starts anew, and what is read of it after the call counts too.

    Returns:
        Those of them that are read first, complete at the end. What cannot be followed counts as read.
    """
    names: dict[str, set[str]] = {}
    for path, name in labels:
        names.setdefault(path, set()).add(name)
    found = {(path, name) for path, own in names.items() for name in own if path not in modules}
    before = {path: type(modules[path]) for path in names if path in modules}
    try:
        for path, plain in before.items():
            followed = {name for name in names[path] if name in modules[path].__dict__}
            found |= {(path, name) for name in names[path] - followed}
            unset = set(followed)
            if each_call:
                _begin_anew(modules[path], followed, unset)
            modules[path].__class__ = _following(plain, path, unset, found)
        yield found
    finally:
        for path, plain in before.items():
            modules[path].__class__ = plain


def _begin_anew(module: nn.Module, names: set[str], unset: set[str]) -> None:
    """Let attributes count as not set where a call of a module begins, and again where it ends."""
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        unset.update(names)
        try:
            return forward(*args, **kwargs)
        finally:
            unset.update(names)

    # a copy's own
    module.__dict__["forward"] = call


def _following(plain: type[nn.Module], path: str, unset: set[str], found: set[tuple[str, str]]) -> type[nn.Module]:
    """Return a subclass for one module, which notes what is read of it first."""

    def get(self: Any, name: str) -> Any:
        if name in unset:
            found.add((path, name))
        return plain.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        unset.discard(name)
        plain.__setattr__(self, name, value)

    members = {"__getattribute__": get, "__setattr__": put, "__module__": plain.__module__}
    return type(plain.__name__, (plain,), members)
