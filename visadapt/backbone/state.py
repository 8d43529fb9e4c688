"""What steers a forward beside weights and inputs: the attributes of modules and of their classes, children, forwards,
small buffers and the global variables that the classes' functions name.

A flag, a list or a child that is changed between two batches may change the order of samples. Whether anything was
changed is asked at each mixed batch, so it is asked in C: the values of all dicts and lists are compared at once. Only
if they differ is it found out what changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules import module as module_hooks

from visadapt.backbone.added import HOOKS, added, count_replacing
from visadapt.backbone.global_names import Named, is_setting, read_globals
from visadapt.backbone.modules import CHILD, FORWARDS
from visadapt.backbone.subclass import plain_class

Label = tuple[str, str]
"""Path of a module (or name of a class) and name of an attribute."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum)

_TORCHS = frozenset(vars(nn.Module())) - {"training"} | {"forward", FORWARDS, "_compiled_call_impl"}
"""Attributes of every module. Children and forwards are compared by themselves."""

_OTHERS = {
    "_is_torch_compile",
    "_output_capturing_hooks_installed",
    "_is_hf_initialized",
    "_flat_weights",
    "_flat_weight_refs",
}
"""Attributes by which torch and transformers keep track of their modules."""

_UNCOUNTED = _TORCHS | _OTHERS

_PREFIXES = ("__", "_visadapt", "_fsdp", "_is_fsdp", "_ddp")

_DEPTH = 4

_MOST = 50_000
"""How many values of containers are compared."""

_INTEGERS, _FLOATS = 4096, 16
"""Elements of the largest buffers that may hold a flag, or the places of rows."""


class State:
    """What steers the forwards of some modules, as it was when this was made.

    Args:
        modules: by path.
        ignored: attributes that do not count, as each forward sets them to what follows from its input.

    Attributes:
        values: what each attribute held, with what is in it.
        hooked: the modules that had hooks.
    """

    def __init__(self, modules: Mapping[str, nn.Module], ignored: frozenset[Label] = frozenset()) -> None:
        self._views: list[Iterable[Any]] = []
        self._counted: list[bool] = []
        # content of containers by identity and depth: many modules share one config
        self._contents: dict[tuple[int, int], list[Any]] = {}
        self._watched: set[int] = set()
        self._open: set[int] = set()
        self._room = _MOST
        self.values: dict[Label, list[Any]] = {}
        training = modules[""].training
        buffers: list[Tensor] = []
        for path, module in modules.items():
            own = module.__dict__
            self._watch(own.values(), [(path, name) not in ignored for name in own])
            for name, value in list(own.items()):
                if name == "training":
                    # of the model as a whole, it is part of a batch's signature
                    self.values[path, name] = [value == training]
                elif not (name in _UNCOUNTED or name.startswith(_PREFIXES) or (path, name) in ignored):
                    self.values[path, name] = self._content(value)
            children = own["_modules"]
            self._watch(children.values())
            self.values[path, "children"] = [each for item in children.items() if item[0] != CHILD for each in item]
            if own["_buffers"]:
                self._watch(own["_buffers"].values())
                held = [b for name, b in own["_buffers"].items() if b is not None and is_index(name, b)]
                buffers += held
                self.values[path, "buffers"] = [buffer.clone() for buffer in held]
            for hooks in HOOKS:
                self._watch(own[hooks].values())
        for hooked in (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks):
            self._watch(hooked.values())
        named: Named = {}
        for cls in {base for module in modules.values() for base in plain_class(module).__mro__}:
            if cls.__module__.partition(".")[0] not in ("torch", "builtins", "visadapt"):
                self._watch(vars(cls).values())
                for name, value in vars(cls).items():
                    if not name.startswith("__"):
                        self.values[f"{cls.__module__}.{cls.__qualname__}", name] = self._content(value)
                read_globals(vars(cls).values(), named)
        for variables, names in named.values():
            settings = {name for name in names if is_setting(variables[name])}
            if settings:
                self._watch(variables.values(), [name in settings for name in variables])
            for name in settings:
                self.values[f"globals of {variables.get('__name__')}", name] = self._content(variables[name])
        now, self.hooked = added(modules)
        self.values["", "forwards and hooks"] = [*now]
        self._contents.clear()
        self._watched.clear()
        # tensors made in inference mode count no changes
        self._buffers = [buffer for buffer in buffers if not buffer.is_inference()]
        self._all = all(self._counted)
        self._kept = self._now()

    def holds(self) -> bool:
        """Return whether nothing was changed since; False also where what was changed does not count."""
        try:
            return bool(self._now() == self._kept)
        except Exception:  # a tensor's comparison has no truth, and any other object may raise anything
            return False

    def changes(self, other: State, ignored: frozenset[Label] = frozenset()) -> set[Label]:
        """Return the attributes that differ from those of another state.

        Args:
            other: of a model of the same structure.
            ignored: attributes that do not count.
        """
        one, two = self.values, other.values
        return {
            label
            for label in (one.keys() | two.keys()) - ignored
            if not (label in one and label in two and _same(one[label], two[label]))
        }

    def _now(self) -> Any:
        values = list(chain.from_iterable(self._views))
        if not self._all and len(values) == len(self._counted):
            values = list(compress(values, self._counted))
        return values, [buffer._version for buffer in self._buffers], count_replacing()

    def _watch(self, view: Any, counted: list[bool] | None = None) -> None:
        self._views.append(view)
        self._counted += [True] * len(view) if counted is None else counted

    def _content(self, value: Any, depth: int = _DEPTH) -> list[Any]:
        """Return a value, or what a container holds; containers that may change are watched."""
        if isinstance(value, (Tensor, nn.Module, type, *_PLAIN)) or not depth or id(value) in self._open:
            return [value]
        if (id(value), depth) in self._contents:
            return self._contents[id(value), depth]
        if isinstance(value, dict):
            inner = [each for item in value.items() for each in item]
        elif isinstance(value, list | tuple | set | frozenset | deque):
            inner = list(value)
        elif _is_options(value):
            inner = [each for item in vars(value).items() for each in item]
        else:
            return [value]
        self._room -= len(inner)
        if self._room < 0:
            return [value]
        if not isinstance(value, tuple | frozenset) and id(value) not in self._watched:
            self._watched.add(id(value))
            held = value if isinstance(value, list | set | dict | deque) else vars(value)
            self._watch(held.values() if isinstance(held, dict) else held)
        self._open.add(id(value))
        content = [type(value), *chain.from_iterable(self._content(each, depth - 1) for each in inner)]
        self._open.remove(id(value))
        return self._contents.setdefault((id(value), depth), content if len(content) <= _MOST else [value])

    def __reduce__(self) -> Any:
        # a copy of the model finds its own
        return type(None), ()


def _is_options(value: Any) -> bool:
    """Return whether a value is an object with attributes such as a config, and not one of torch or Python."""
    library = type(value).__module__.partition(".")[0]
    ours = library in ("torch", "builtins", "functools", "threading", "weakref", "numpy", "accelerate", "visadapt")
    return not ours and not callable(value) and hasattr(value, "__dict__")


def is_index(name: str, buffer: Tensor) -> bool:
    """Return whether a buffer may hold a flag, or the places of rows, and is watched for changes."""
    if name in ("num_batches_tracked", "running_mean", "running_var") or buffer.is_meta:
        return False
    most = _FLOATS if buffer.is_floating_point() or buffer.is_complex() else _INTEGERS
    return 0 < buffer.numel() <= most


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        # while a graph is made, tensors may have no values
        return alike and (is_fake(one) or is_fake(other) or (not one.is_meta and bool(torch.equal(one, other))))
    if type(one) is not type(other):
        return False
    return isinstance(one, (tuple, list, *_PLAIN)) and bool(one == other)
