"""Hosts: how a module of the backbone carries the parts of many tasks without ceasing to be itself.

A host keeps its parameters, its hooks and its place in the model; only its ``__class__`` is swapped for a cached
subclass of the same name, whose ``forward`` asks which task is meant and lets that task's parts act. The parts live in
a child of the host named ``visadapt``, so ``.to()``, ``state_dict`` and ``deepcopy`` treat them like everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, update_wrapper
from typing import Any, cast

from torch import nn

from visadapt.backbone.modules import CHILD, UNFUSED, is_stateful, plain_class
from visadapt.errors import VisadaptError
from visadapt.runtime.classes import Maker, cached, frozen_class, subclass
from visadapt.runtime.mixed import run_mixed
from visadapt.runtime.registry import Parts, Registry
from visadapt.runtime.roles import role, run
from visadapt.runtime.weights import owned_members


@cached
def hosting_class(plain: type[nn.Module], *, owned: tuple[str, ...] = ()) -> type[nn.Module]:
    """A subclass whose forward lets the active task's parts act.

    Args:
        plain: the host's class.
        owned: names of the host's parameters that some task has values of its own for.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = cast("Parts", self._modules[CHILD])
        task = parts._registry.acting()
        if isinstance(task, tuple):
            return run_mixed(self, plain, parts, task, args, kwargs)
        if task is None or task not in parts:
            return plain.forward(self, *args, **kwargs)
        return run(self, plain, cast("nn.ModuleDict", parts[task]), args, kwargs)

    # the signature stays the host's own, for those who look at it
    members: dict[str, Any] = {"forward": update_wrapper(forward, plain.forward), "_visadapt_owned": owned}
    members |= owned_members(plain, owned)
    if issubclass(plain, nn.Sequential):
        members |= {"__iter__": _layers, "__len__": _number_of_layers}
    return subclass(plain, partial(hosting_class, owned=owned) if owned else hosting_class, **members)


def _hosting(plain: type[nn.Module], owned: tuple[str, ...]) -> type[nn.Module]:
    return hosting_class(plain, owned=owned) if owned else hosting_class(plain)


def _layers(self: nn.Module) -> Iterator[nn.Module | None]:
    # a Sequential runs, counts and slices its children: the parts are none of its layers
    return (child for name, child in self._modules.items() if name != CHILD)


def _number_of_layers(self: nn.Module) -> int:
    return sum(name != CHILD for name in self._modules)


def swap(module: nn.Module, make: Maker | None) -> None:
    """Puts the class that ``make`` makes under the hosting one, or takes the topmost out there (``make`` is None)."""
    cls = type(module)
    hosts = CHILD in module._modules
    base: Any = cls._visadapt_base if hosts else cls  # type: ignore[attr-defined]
    base = base._visadapt_base if make is None else make(base)
    module.__class__ = _hosting(base, cls._visadapt_owned) if hosts else base  # type: ignore[attr-defined]


def attach(host: nn.Module, registry: Registry, task: str, name: str, part: nn.Module) -> None:
    """Gives ``host`` a part of ``task``, swapping the host's class if it is the first."""
    if CHILD not in host._modules:
        parts = Parts()
        parts._registry = registry
        host.add_module(CHILD, parts)
        host.__class__ = hosting_class(type(host))
    parts = cast("Parts", host._modules[CHILD])
    if task not in parts:
        parts[task] = nn.ModuleDict().train(part.training)
    parts.training = part.training
    own = cast("nn.ModuleDict", parts[task])
    own[name] = part
    if role(part) == "weights":
        if getattr(part, "replaces", False):
            # what changes weights changes the task's own
            own._modules.update({key: own._modules.pop(key) for key in [k for k in own._modules if k != name]})
        _answer_for(host, part)


def _answer_for(host: nn.Module, part: nn.Module) -> None:
    """Has the host's class answer for the parameters that a part may change."""
    cls: Any = type(host)
    names = getattr(part, "names", None) or [name for name, own in host._parameters.items() if own is not None]
    owned = tuple(sorted({*cls._visadapt_owned, *names}))
    if owned != cls._visadapt_owned:
        host.__class__ = _hosting(cls._visadapt_base, owned)


def detach(host: nn.Module, task: str) -> None:
    """Takes all parts of ``task`` away; a host left without any is what it was before the first."""
    parts = cast("Parts", host._modules[CHILD])
    del parts[task]
    if not parts:
        del host._modules[CHILD]
        host.__class__ = type(host)._visadapt_base  # type: ignore[attr-defined]


def freeze(module: nn.Module) -> None:
    """Makes what a module moves in train mode stand still: running statistics, the vectors of a power iteration."""
    iterates = any(name.endswith("_u") and f"{name[:-1]}v" in module._buffers for name in module._buffers)
    if (is_stateful(module) or iterates) and plain_class(module) is type(module):
        module.__class__ = frozen_class(type(module))


def unfuse(module: nn.Module, registry: Registry) -> None:
    """Keeps torch's TransformerEncoder off its fused kernel while a task is active.

    In eval mode the kernel reads the weights of the layers inside and calls none of them: no part would act.
    """
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
        module.__dict__[UNFUSED] = registry
        module.__class__ = unfused_class(type(module))  # type: ignore[assignment]


@cached
def unfused_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that says it has no fused kernel whenever a task is active."""
    switch = "activation_relu_or_gelu" if issubclass(plain, nn.TransformerEncoderLayer) else "use_nested_tensor"

    def get(self: nn.Module) -> Any:
        active = UNFUSED in self.__dict__ and self.__dict__[UNFUSED].current() is not None
        return 0 if active else self.__dict__[switch]

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[switch] = value

    return subclass(plain, unfused_class, **{switch: property(get, put)})


def check_free(model: nn.Module, names: dict[str, nn.Module]) -> None:
    """Refuses a model of which a module is carried by another injected model already, or has no weights yet."""
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
