"""Entries of mixed batches: the model's forward, another method of the model, or a module inside it called directly.

Rows are examined for each entry separately. While an entry runs, the modules inside it do not act as entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import update_wrapper
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Proxy

from visadapt.backbone.entry import Entry
from visadapt.backbone.modules import ENTERED, REGISTRY, joined
from visadapt.backbone.subclass import ModuleClass, cached, subclass
from visadapt.backbone.tracing import is_recording, is_tracing, run_uncompiled_before_torch_2_14, runs_uncompiled
from visadapt.errors import VisadaptError
from visadapt.runtime.blocks import frames
from visadapt.runtime.by_row import facts_are_current
from visadapt.runtime.choice import AUTO
from visadapt.runtime.divided import TRYING, run_batch, trying
from visadapt.runtime.registry import Mixed, Registry


class OutsideError(VisadaptError):
    """A host was called with a mixed batch outside of an entry whose rows are known."""


@cached
def door_class(plain: ModuleClass) -> ModuleClass:
    """Return a subclass whose forward and other public methods accept batches of mixed tasks.

    Args:
        plain: class of the root module, or of a module that contains hosts.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if runs_uncompiled():
            return run_uncompiled_before_torch_2_14(forward, self, args, kwargs)
        registry: Registry | None = self.__dict__.get(REGISTRY)
        if registry is None:
            return _entered(self, "forward", plain.forward, args, kwargs)
        tasks = registry.current()
        if not is_outside(tasks):
            return plain.forward(self, *args, **kwargs)
        if is_tracing():
            check_compiled(self, registry, tasks, args, kwargs)
            return plain.forward(self, *args, **kwargs)
        return enter(self, registry, tasks, args, kwargs)

    forward.__wrapped__ = plain.forward  # type: ignore[attr-defined]
    return subclass(plain, door_class, **_methods(plain), forward=forward)


def _methods(plain: ModuleClass) -> dict[str, Any]:
    """Return the public methods of a class, wrapped so that they can be entries."""
    found: dict[str, Any] = {}
    for base in reversed(plain.__mro__):
        if base in nn.Module.__mro__:
            continue
        for name, own in vars(base).items():
            found.pop(name, None)
            usual = isinstance(own, FunctionType) and not name.startswith("_") and not hasattr(nn.Module, name)
            if usual and not (inspect.isgeneratorfunction(own) or inspect.iscoroutinefunction(own)):
                found[name] = _method(name, own)
    return found


def _method(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _entered(self, name, own, args, kwargs)

    return update_wrapper(method, own)


def _entered(module: nn.Module, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a method of a module; with a mixed batch, as an entry if it calls hosts."""
    registry: Registry | None
    registry, path = module.__dict__.get(ENTERED) or (module.__dict__.get(REGISTRY), "")
    if is_tracing() or registry is None or module.__dict__.get("_is_replica") or not registry.may_be_divided():
        return own(module, *args, **kwargs)
    tasks = registry.acting()
    if not is_outside(tasks) or tasks == AUTO or registry in TRYING.get():
        return own(module, *args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        return own(module, *args, **kwargs)

    entry = Entry(path, name)
    # gradient checkpointing counts the saved tensors, so nothing may run twice under its hooks
    if entry not in registry.facts.entries and not _saves_through_hooks():
        try:
            with trying(registry):
                return call(*args, **kwargs)
        except OutsideError:
            pass  # it calls hosts: from now on it is an entry
    return enter_by(registry, entry, tasks, call, args, kwargs)


def _saves_through_hooks() -> bool:
    """Return whether hooks such as those of gradient checkpointing get what autograd saves."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("there are hooks"):
            return False
    except RuntimeError:  # only where there are such hooks
        return True


def is_outside(tasks: Any) -> bool:
    """Return whether several tasks or "auto" are active and the batch has not been examined yet."""
    return tasks == AUTO or (isinstance(tasks, tuple) and not isinstance(tasks, Mixed))


def outside(place: str, reason: object = "") -> OutsideError:
    """Return the error for a host that is called outside of an entry."""
    why = f" ({reason})" if reason else ""
    return OutsideError(
        f"{place} was called outside of the model's own forward, where it is not known which rows belong to which "
        f"sample{why}: give a batch of mixed tasks to model(...) itself, or run one task at a time"
    )


def enter(model: nn.Module, registry: Registry, tasks: Any, args: Any, kwargs: Any) -> Any:
    """Run the model on a batch of mixed tasks.

    Args:
        model: the injected model.
        registry: its registry.
        tasks: one task per sample, or ``"auto"``.
        args: positional arguments of the forward.
        kwargs: keyword arguments of the forward.

    Raises:
        VisadaptError: the number of tasks is not the number of samples; samples depend on each other; the batch cannot
            be split or the outputs cannot be joined; a tracer makes the call.
    """
    _check_not_traced(tasks, args, kwargs)
    if tasks == AUTO:
        tasks = tuple(registry.decider.choose(model, kwargs if kwargs and not args else args))
        registry.note_forward((name, None) for name in tasks)
    return run_batch(model, registry, tasks, model.forward, registry.facts.of_batches(), args, kwargs)


def enter_by(
    registry: Registry,
    entry: Entry,
    tasks: tuple[str | None, ...],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Run a batch of mixed tasks by another entry than the model's forward.

    Args:
        registry: the model's registry.
        entry: module and method.
        tasks: one task per sample.
        call: the method, bound to its module.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        OutsideError: another entry is being tried, a torch.fx graph makes the call, or its rows cannot be found.
        VisadaptError: a task was removed, the model is reserved for another thread, or a tracer makes the call.
    """
    _check_not_traced(tasks, args, kwargs)
    place = entry.path if entry.method == "forward" else joined(entry.path, entry.method)
    if registry in TRYING.get() or any(isinstance(f.f_locals.get("self"), GraphModule) for f in frames()):
        # between the modules that a graph calls, its operators may reorder rows
        raise outside(place)
    registry.reservation.check()
    registry.in_use()
    batches = registry.facts.of_batches(entry)
    try:
        return run_batch(registry.facts.model, registry, tasks, call, batches, args, kwargs)
    except OutsideError:
        raise
    except VisadaptError as error:
        raise outside(place, error) from error


def _check_not_traced(tasks: Any, args: Any, kwargs: Any) -> None:
    """Refuse a batch of mixed tasks in tracers whose graph would have neither its rows nor its tasks."""
    symbolic = any(isinstance(value, Proxy) for value in (*args, *kwargs.values()))
    recorded = is_recording() and (tasks == AUTO or len(set(tasks)) > 1)
    if symbolic or recorded:
        raise VisadaptError(
            f"{'torch.fx' if symbolic else 'torch.jit.trace'} cannot trace a batch of mixed tasks: trace one task, or "
            "use torch.export"
        )


def check_compiled(model: nn.Module, registry: Registry, tasks: Any, args: Any, kwargs: Any) -> None:
    """Check a batch of mixed tasks while ``torch.compile`` traces, when its rows cannot be examined.

    Raises:
        VisadaptError: no batch of this model was examined since it was last changed; the number of tasks is not the
            batch size.
    """
    if not facts_are_current(registry._number):
        raise VisadaptError(
            "what steers the model's forward was changed since its last batch of mixed tasks: run one again before "
            "torch.compile, which shows which rows belong to which sample now"
        )
    first = _first_tensor((*args, *kwargs.values()))
    if tasks == AUTO or not registry.facts.batches.hosts:
        raise VisadaptError(
            "run one batch of these tasks before torch.compile: it shows which rows belong to which sample"
        )
    if first is not None and first.shape[0] != len(tasks):
        raise VisadaptError(f"{len(tasks)} tasks were named for a batch of {first.shape[0]}: name one per sample")


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
    return None
