"""Hosts: how a module of the backbone carries the parts of many tasks without ceasing to be itself.

A host keeps its parameters, its hooks and its place in the model; only its ``__class__`` is swapped for a cached
subclass of the same name, whose ``forward`` asks which task is meant and lets that task's parts act. The parts live in
a child of the host named ``visadapt``, so ``.to()``, ``state_dict`` and ``deepcopy`` treat them like everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, update_wrapper
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from visadapt.errors import VisadaptError

if TYPE_CHECKING:
    from visadapt.registry import Registry

CHILD = "visadapt"
"""Name of the host's child that holds the tasks' parts."""


LEAN = "_visadapt_lean"
"""Attribute of a module that :func:`visadapt.lean` made lean."""


class Parts(nn.ModuleDict):
    """The parts of all tasks at one host: task name → part name → module."""

    _registry: Registry

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint that says nothing of a task leaves that task as it is: vanilla checkpoints still load, strictly.
        for task, parts in self._modules.items():
            at = f"{prefix}{task}."
            if parts is not None and not any(key.startswith(at) for key in state_dict):
                # the parameters themselves: with assign=True an optimiser goes on holding what the model holds
                state_dict.update({at + key: value for key, value in parts.state_dict(keep_vars=True).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before visadapt swapped it (its own class if it never did)."""
    cls: type[nn.Module] = getattr(type(module), "_visadapt_recipe", (type(module),))[0]
    return cls


def is_stateful(module: nn.Module) -> bool:
    """Whether the module keeps running statistics, which training would move (BatchNorm and its kin)."""
    return any(name.startswith("running_") and value is not None for name, value in module._buffers.items())


Maker = Callable[[type[nn.Module]], type[nn.Module]]


def cached(make: Maker) -> Maker:
    """``functools.cache`` for makers of classes: one subclass a class."""
    return cast("Maker", cache(make))


def _never_trains(module: nn.Module) -> bool:
    return False


def _set_training(module: nn.Module, mode: bool) -> None:
    # remembered, so that an ejected module is in the mode that its parent was last put into
    module.__dict__["training"] = mode


def _rebuild(plain: type[nn.Module], makers: tuple[Any, ...]) -> nn.Module:
    cls = plain
    for make in makers:
        cls = make(cls)
    return cls.__new__(cls)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # the class was made at run time: pickle finds it again by what it was made from
    return _rebuild, getattr(type(self), "_visadapt_recipe"), self.__dict__  # noqa: B009


def subclass(plain: type[nn.Module], make: Maker, **members: Any) -> type[nn.Module]:
    """A subclass of the same name that pickle finds again; ``make`` is the cached function that makes it."""
    root, makers = getattr(plain, "_visadapt_recipe", (plain, ()))
    members |= {
        "_visadapt_base": plain,
        "_visadapt_recipe": (root, (*makers, make)),
        "__reduce_ex__": _reduce,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (plain,), members)


@cached
def frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that is always in eval mode, whatever ``.train()`` a parent calls: its statistics stand still."""
    return subclass(plain, frozen_class, training=property(_never_trains, _set_training))


@cached
def hosting_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward lets the active task's parts act."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = cast("Parts", self._modules[CHILD])
        task = parts._registry.acting()
        if isinstance(task, tuple):
            from visadapt.mixed import run_mixed

            return run_mixed(self, plain, parts, task, args, kwargs)
        if task is None or task not in parts:
            return plain.forward(self, *args, **kwargs)
        return run(self, plain, cast("nn.ModuleDict", parts[task]), args, kwargs)

    # the signature stays the host's own, for those who look at it
    members: dict[str, Any] = {"forward": update_wrapper(forward, plain.forward)}
    if issubclass(plain, nn.Sequential):
        members |= {"__iter__": _layers, "__len__": _number_of_layers}
    return subclass(plain, hosting_class, **members)


def _layers(self: nn.Module) -> Iterator[nn.Module | None]:
    # a Sequential runs, counts and slices its children: the parts are none of its layers
    return (child for name, child in self._modules.items() if name != CHILD)


def _number_of_layers(self: nn.Module) -> int:
    return sum(name != CHILD for name in self._modules)


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
    """Applies ``function`` to a module's output, or to its first element where the output is a tuple."""
    if isinstance(out, Tensor):
        return function(out)
    return (function(out[0]), *out[1:])


def parts_of(host: nn.Module, task: str) -> Mapping[str, nn.Module]:
    """A task's parts at a module, by name; it may well have none."""
    parts = host._modules.get(CHILD)
    own = parts._modules.get(task) if isinstance(parts, Parts) else None
    return {} if own is None else cast("Mapping[str, nn.Module]", own._modules)


def swap(module: nn.Module, make: Maker | None) -> None:
    """Puts the class that ``make`` makes under the hosting one, or takes the topmost out there (``make`` is None)."""
    cls = type(module)
    hosts = CHILD in module._modules
    base: Any = cls._visadapt_base if hosts else cls  # type: ignore[attr-defined]
    base = base._visadapt_base if make is None else make(base)
    module.__class__ = hosting_class(base) if hosts else base


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
    cast("nn.ModuleDict", parts[task])[name] = part


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


UNFUSED = "_visadapt_unfused"


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


def unfreeze(module: nn.Module) -> None:
    """Gives a module without parts its own class back."""
    module.__dict__.pop(LEAN, None)
    module.__dict__.pop(UNFUSED, None)
    module.__class__ = plain_class(module)


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


def own_copy(norm: nn.Module, full: bool) -> nn.Module:
    """A task's own copy of a norm: the same class, its own affine parameters.

    Args:
        norm: a module of the backbone, with or without parts.
        full: whether the copy has running statistics of its own, which move in train mode. Otherwise it reads the
            backbone's, through the very same dict of buffers, so that they follow the backbone to other devices.
    """
    plain = plain_class(norm)
    weight = next(p for p in norm._parameters.values() if p is not None)
    low = weight.dtype in (torch.float16, torch.bfloat16)
    cls = widened_class(plain) if low else plain
    clone = cls.__new__(cls)
    nn.Module.__init__(clone)
    own = {k: v for k, v in norm.__dict__.items() if k not in clone.__dict__ or k == "training"}
    clone.__dict__.update(own)
    for name, parameter in norm._parameters.items():
        # adapters and norms of a task are kept in fp32 beside a half-precision backbone
        value = None if parameter is None else parameter.detach().clone()
        if value is not None:
            value = value.float() if low else value
        clone._parameters[name] = None if value is None else nn.Parameter(value)
    for name, child in norm._modules.items():
        if name != CHILD:
            clone._modules[name] = copy.deepcopy(child)
    clone._non_persistent_buffers_set = set(norm._non_persistent_buffers_set)
    if full or low:
        clone._buffers = {
            k: None if v is None else (v.detach().float() if low and v.is_floating_point() else v.detach().clone())
            for k, v in norm._buffers.items()
        }
    else:
        clone._buffers = norm._buffers
    if not full:
        clone._non_persistent_buffers_set.update(clone._buffers)
        if is_stateful(norm):
            clone.__dict__["track_running_stats"] = False
            clone.__class__ = frozen_class(cls)
    return clone


@cached
def widened_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A norm or head in fp32 in a half-precision network: it computes in fp32 and answers in its input's dtype."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast("Tensor", plain.forward(self, x.float(), *args, **kwargs)).to(x.dtype)

    return subclass(plain, widened_class, forward=forward)
