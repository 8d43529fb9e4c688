"""Hosts: modules of the backbone that carry the parts of many tasks and keep their identity.

A host keeps its parameters, its hooks and its place in the model; only its ``__class__`` is swapped for a cached
subclass of the same name, whose ``forward`` looks up the active task and lets that task's parts act. The parts live in
a child of the host named ``visadapt``, so ``.to()``, ``state_dict`` and ``deepcopy`` treat them like everything else.
"""

from __future__ import annotations

from functools import partial, update_wrapper
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from visadapt.backbone.modules import CHILD, FORWARDS, UNFUSED, is_stateful, release_forward
from visadapt.backbone.subclass import (
    Maker,
    ModuleClass,
    cached,
    is_made_by,
    made_by,
    plain_class,
    rebuilt,
    subclass,
    without,
)
from visadapt.backbone.tracing import run_uncompiled_before_torch_2_14, runs_uncompiled
from visadapt.errors import VisadaptError
from visadapt.runtime.choice import AUTO
from visadapt.runtime.classes import frozen_class
from visadapt.runtime.containers import container_members, listing_class, lists_children
from visadapt.runtime.forwards import count_given, given_class
from visadapt.runtime.lost_gradients import check_gradients
from visadapt.runtime.mixed import run_mixed
from visadapt.runtime.registry import Parts, Registry
from visadapt.runtime.roles import role, run
from visadapt.runtime.symbolic import proxy_among, traced
from visadapt.runtime.weights import check_kept, owned_members, tensor_tables


@cached
def hosting_class(plain: ModuleClass, *, owned: tuple[str, ...] = (), tables: tuple[str, ...] = ()) -> ModuleClass:
    """A subclass whose forward lets the active task's parts act.

    Args:
        plain: the host's class.
        owned: names of the host's parameters that some task has values of its own for.
        tables: names of the tables in which it may keep what it computed from these.

    A forward that is assigned to this one module (by accelerate's hooks or a patch) is not put in ``__dict__``, where
    it would be called instead of this one: it replaces the host's own forward, around which the parts act.
    """
    level = count_given(plain)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if runs_uncompiled():
            return run_uncompiled_before_torch_2_14(forward, self, args, kwargs)
        parts: Parts | None = self.__dict__["_modules"].get(CHILD)
        if parts is None or len(self.__dict__.get(FORWARDS, ())) > level:
            # stored elsewhere before this was a host, or before it was given another forward that calls this one
            return plain.forward(self, *args, **kwargs)
        proxy = proxy_among(args, kwargs)
        if proxy is not None:
            return traced(self, plain, parts, proxy, args, kwargs)
        task = parts._registry.acting()
        if self.training and not torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
            check_gradients(parts, task)
        if isinstance(task, tuple) or task == AUTO:
            return run_mixed(self, plain, parts, task, args, kwargs)
        own = None if task is None else parts._of(task)
        if own is None:
            if task is not None:
                parts._registry.check_current()
            return plain.forward(self, *args, **kwargs)
        return run(self, plain, own, args, kwargs)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward":
            give_forward(self, value)
        else:
            plain.__setattr__(self, name, value)

    def delete_attribute(self: nn.Module, name: str) -> None:
        if name == "forward" and FORWARDS in self.__dict__:
            _keep_forwards(self, ())
        else:
            check_kept(self, name)
            plain.__delattr__(self, name)

    # keeps the host's own signature
    members: dict[str, Any] = {
        "forward": update_wrapper(forward, plain.forward),
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "_visadapt_owned": owned,
        **owned_members(plain, owned, tables),
        **container_members(plain),
    }
    _LEVELS[forward] = level
    make = partial(hosting_class, owned=owned, tables=tables) if owned else hosting_class
    return subclass(plain, make, **members)


_LEVELS: dict[Any, int] = {}
"""The forwards of hosting classes, and how many forwards given to the module they call."""


def give_forward(host: nn.Module, forward: Any) -> None:
    """Let a host call ``forward`` as its own, with its parts around it; an earlier one of the host's is restored."""
    kept: tuple[Any, ...] = host.__dict__.get(FORWARDS, ())
    if isinstance(forward, MethodType) and forward.__self__ is host:
        own = 0 if forward.__func__ is plain_class(host).forward else None
        level = _LEVELS.get(forward.__func__, own)
        if level is not None and level <= len(kept):
            _keep_forwards(host, kept[:level])
            return
    _keep_forwards(host, (*kept, forward))


def _keep_forwards(host: nn.Module, forwards: tuple[Any, ...]) -> None:
    if forwards:
        host.__dict__[FORWARDS] = forwards
    else:
        host.__dict__.pop(FORWARDS, None)

    def change(cls: ModuleClass) -> ModuleClass:
        make = made_by(cls)[-1]
        cls = without(cls, hosting_class, given_class)
        for _ in forwards:
            cls = given_class(cls)
        return make(cls)

    host.__class__ = rebuilt(type(host), change)


def dress(module: nn.Module, make: Maker) -> None:
    """Add the class that ``make`` makes to a module's, below the hosting one and below other libraries' classes."""

    def change(cls: ModuleClass) -> ModuleClass:
        makers = made_by(cls)
        if not makers or not is_made_by(makers[-1], (hosting_class,)):
            return make(cls)
        return makers[-1](make(without(cls, hosting_class)))

    module.__class__ = rebuilt(type(module), change)


def undress(module: nn.Module, *makers: Maker) -> None:
    """Remove the classes that ``makers`` made from a module's, wherever they are."""
    module.__class__ = without(type(module), *makers)


def attach(host: nn.Module, registry: Registry, path: str, task: str, name: str, part: nn.Module) -> None:
    """Give ``host`` a part of ``task``, swapping the host's class if it is the first."""
    if CHILD not in host._modules:
        parts = Parts()
        parts._registry, parts._path, parts.training = registry, path, part.training
        given = host.__dict__.pop("forward", None)
        _put_child(host, CHILD, parts)
        host.__class__ = rebuilt(type(host), hosting_class)
        kept = host.__dict__.get(FORWARDS, ())
        if lists_children(plain_class(host)):
            dress(host, listing_class)
        if given is not None:
            _keep_forwards(host, kept if kept and kept[-1] is given else (given,))
    registry.unfilled.note(task, part.parameters())
    for module in part.modules():
        # a model's own init_weights() and post_init() would draw it anew
        module.__dict__["_is_hf_initialized"] = True
    parts = cast("Parts", host._modules[CHILD])
    own = parts._put(task, part.training)
    if role(part) == "weights":
        _answer_for(host, part)
    # a part that changes weights must change the task's own
    _put_child(own, name, part, first=getattr(part, "replaces", False))


def _put_child(module: nn.Module, name: str, child: nn.Module, first: bool = False) -> None:
    """Give a module a child by a new dict of children: a forward in another thread may be reading the old one."""
    old = module.__dict__["_modules"]
    module.__dict__["_modules"] = type(old)({name: child} | old if first else old | {name: child})


def _drop_child(module: nn.Module, name: str) -> None:
    old = module.__dict__["_modules"]
    module.__dict__["_modules"] = type(old)({key: child for key, child in old.items() if key != name})


def _answer_for(host: nn.Module, part: nn.Module) -> None:
    """Give the host's class properties for the parameters that a part may change."""
    before: tuple[str, ...] = host._visadapt_owned  # type: ignore[assignment]
    names = getattr(part, "names", None) or [name for name, own in host._parameters.items() if own is not None]
    owned = tuple(sorted({*before, *names}))
    if owned != before:
        make = partial(hosting_class, owned=owned, tables=tensor_tables(host))
        host.__class__ = rebuilt(type(host), lambda cls: make(without(cls, hosting_class)))


def detach(host: nn.Module, task: str) -> None:
    """Remove all parts of ``task``; a host without any is again what it was before the first."""
    parts = cast("Parts", host._modules[CHILD])
    parts._drop(task)
    if not len(parts):
        _drop_child(host, CHILD)
        undress(host, hosting_class, given_class, listing_class)
        release_forward(host)


def freeze(module: nn.Module) -> None:
    """Freeze what a module changes in train mode: running statistics, the vectors of a power iteration."""
    iterates = any(name.endswith("_u") and f"{name[:-1]}v" in module._buffers for name in module._buffers)
    if (is_stateful(module) or iterates) and plain_class(module) is type(module):
        module.__class__ = frozen_class(type(module))


def unfuse(module: nn.Module, registry: Registry) -> None:
    """Keep torch's TransformerEncoder off its fused kernel while a task is active.

    In eval mode the kernel reads the weights of the layers inside and calls none of them: no part would act.
    """
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
        module.__dict__[UNFUSED] = registry
        module.__class__ = unfused_class(type(module))  # type: ignore[assignment]


@cached
def unfused_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that reports no fused kernel whenever a task is active."""
    switch = "activation_relu_or_gelu" if issubclass(plain, nn.TransformerEncoderLayer) else "use_nested_tensor"

    def get(self: nn.Module) -> Any:
        active = UNFUSED in self.__dict__ and self.__dict__[UNFUSED].current() is not None
        return 0 if active else self.__dict__[switch]

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[switch] = value

    return subclass(plain, unfused_class, **{switch: property(get, put)})


def check_free(model: nn.Module, names: dict[str, nn.Module]) -> None:
    """Refuse a model with a module of another injected model, one without weights yet, and a graph of torch.fx."""
    if isinstance(model, GraphModule):
        raise VisadaptError(
            f"{type(model).__name__} is a graph of torch.fx, whose copies keep only what the graph names: call "
            "visadapt.inject before it is traced, or on a module around it, such as nn.Sequential(model)"
        )
    for name, module in names.items():
        if plain_class(module) is not type(module) or CHILD in module._modules:
            raise VisadaptError(
                f"{name or type(model).__name__} is already part of another injected model: call visadapt.inject on "
                "that one, or visadapt.eject it first"
            )
        if any(p is not None and nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise VisadaptError(
                f"{name or type(model).__name__} has uninitialised parameters: run the model once, then inject"
            )
