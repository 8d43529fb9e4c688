"""The prefix of a task: what a backbone computes below the first site that the task trains, and going on from there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.dataflow import Call, Flow
from visadapt.backbone.modules import PREFIX, ancestors, inside, joined, own_modules, unwrapped, within
from visadapt.backbone.subclass import cached, plain_class, subclass
from visadapt.backbone.trace import call, trace_flow
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.frozen.checksums import Checksums
from visadapt.runtime.choice import AUTO
from visadapt.runtime.host import dress, undress
from visadapt.runtime.registry import registry_of
from visadapt.runtime.selection import bare, using


@dataclass(eq=False)
class _Call:
    """A forward that stops at the end of a prefix (``features`` is None), or starts there.

    Attributes:
        shapes: the spared modules, and the shape of what each gives for one sample; None for the last one.
        features: the prefix's output to go on from.
        reached: whether the last module was called.
    """

    shapes: dict[nn.Module, tuple[int, ...] | None]
    features: Tensor | None = None
    reached: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("visadapt_prefix", default=None)

_RESUMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that were spared in a forward with gradients."""


class _EndOfPrefix(BaseException):
    """Ends a forward once the prefix is through."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


@cached
def sparing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that computes nothing in a forward which starts behind it, and its own forward in every other."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_tracing():
            return plain.forward(self, *args, **kwargs)
        at = _CALL.get()
        if at is None or self not in at.shapes:
            if self in _RESUMED and torch._C._current_graph_task_id() != -1:
                raise VisadaptError(
                    f"{plain.__name__} is computed again in backward (gradient checkpointing) and lies below the end "
                    "of a prefix that is cached: checkpoint only what lies above it, or train without the cache"
                )
            return plain.forward(self, *args, **kwargs)
        shape = at.shapes[self]
        if at.features is None:
            out = plain.forward(self, *args, **kwargs)
            if shape is None:
                raise _EndOfPrefix(out)
            return out
        at.reached = at.reached or shape is None
        # the output of a spared module is never read, so its memory is left as it is
        return at.features if shape is None else at.features.new_empty((len(at.features), *shape))

    return subclass(plain, sparing_class, forward=forward)


class Prefix:
    """The part of a backbone below the first host of a task, and how to go on from its output.

    Any number of prefixes may be open on one model: which one per forward starts from is known to that forward only.

    Args:
        model: an injected model.
        task: the task; its first host and everything above are computed in every step.
        example: an input, as :func:`visadapt.sites` takes it; guessed if None.

    Attributes:
        path: the last module of the prefix.

    Raises:
        VisadaptError: nothing lies below the first trained host, or what lies above needs more of it than one tensor.
    """

    def __init__(self, model: nn.Module, task: str, example: Any = None) -> None:
        self.model, self.task = unwrapped(model), task
        hosts = set(registry_of(model).task(task).hosts)
        flow, _ = trace_flow(self.model, example)
        cut = _cut(flow, hosts)
        if cut is None:
            first = next((c.path for c in flow.calls if c.path in hosts), "its first host")
            raise VisadaptError(
                f"task {task!r} trains at {first or 'the root'} already, and no single tensor lies below it: there "
                "is no prefix to keep (where= puts adapters into late stages, norms='frozen' keeps early norms out)"
            )
        self.path = cut.path
        shapes = _spared(flow, cut)
        modules = own_modules(self.model)
        self._paths = {path: modules[path] for path in shapes}
        self._outer = sorted({outer for path in shapes for outer in ancestors(path)})
        self.spared = [modules[path] for path in shapes]
        self._shapes = {modules[path]: shape for path, shape in shapes.items()}
        for module in self.spared:
            module.__dict__[PREFIX] = module.__dict__.get(PREFIX, 0) + 1
            if module.__dict__[PREFIX] == 1:
                dress(module, sparing_class)
        self.autocast = _autocast(self.model)
        self.checksums = Checksums(list(self.tensors().values()))
        self.hooks = self._hooks()

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that the prefix computes with, by name.

        Raises:
            VisadaptError: a module of the prefix was replaced.
        """
        found: dict[str, Tensor] = {}
        for path in self._outer:
            found.update(_own_tensors(self.model.get_submodule(path), path))
        for path, module in self._paths.items():
            if self.model.get_submodule(path) is not module:
                raise VisadaptError(f"{path} was replaced since the prefix was cached: make the cache again")
            for inner, own in own_modules(module).items():
                found.update(_own_tensors(own, joined(path, inner)))
        return found

    def structure(self) -> list[str]:
        """The modules of the prefix as far as they say what they compute: path, class and options."""
        found = []
        for path, module in self._paths.items():
            for inner, own in own_modules(module).items():
                cls = plain_class(own)
                found.append(f"{joined(path, inner)} {cls.__module__}.{cls.__qualname__} {own.extra_repr()}")
        return found

    def _hooks(self) -> list[tuple[int, ...]]:
        return [
            (*own._forward_pre_hooks, -1, *own._forward_hooks)
            for module in self.spared
            for own in own_modules(module).values()
        ]

    def check_task(self, task: str, what: str) -> None:
        """Refuses a task that has parts within the prefix, or that is gone.

        Raises:
            VisadaptError: its first such host is named.
        """
        for path in registry_of(self.model).task(task).hosts:
            if within(path, self._paths) or any(within(spared, [path]) for spared in self._paths):
                raise VisadaptError(
                    f"{what} is of task {self.task!r} and starts behind {self.path}; task {task!r} acts at "
                    f"{path or 'the root'} already: make one with cache_prefix(model, {task!r}, …)"
                )

    def check(self) -> None:
        """Refuse to resume if the result would differ from the whole model's.

        Raises:
            VisadaptError: the prefix is closed; the active task acts within it; autocast, weights, modules or hooks
                are not what they were when it was made.
        """
        if not self.spared:
            raise VisadaptError(f"the cache of task {self.task!r} was closed")
        current = registry_of(self.model).current()
        if current == AUTO:
            raise VisadaptError("a cache cannot be used with the task 'auto': name the task of each sample")
        for name in dict.fromkeys(current if isinstance(current, tuple) else (current,)):
            if name is not None:
                self.check_task(name, "the cache")
        if _autocast(self.model) != self.autocast:
            raise VisadaptError(
                f"the cache was made {_told(self.autocast)} and is used {_told(_autocast(self.model))}: make it in the "
                "same autocast context that it is used in"
            )
        if self._hooks() != self.hooks:
            raise VisadaptError(
                f"hooks below {self.path} were added or removed since the cache was made: make it again"
            )
        if Checksums(list(self.tensors().values())) != self.checksums:
            raise VisadaptError(f"weights below {self.path} changed since the cache was made: make it again")

    @torch.no_grad()
    def compute(self, inputs: Any) -> Tensor:
        """The prefix's output for a batch, in eval mode.

        Raises:
            VisadaptError: the model did not call the last module of the prefix, or that did not give a tensor.
        """
        token = _CALL.set(_Call(self._shapes))
        out: Any = None
        try:
            with bare(self.model), using(self.model, self.task):
                call(self.model, inputs)
        except _EndOfPrefix as end:
            out = end.output
        finally:
            _CALL.reset(token)
        if not isinstance(out, Tensor):
            raise VisadaptError(f"{self.path} gave no tensor when the model ran: its output cannot be kept")
        return out.detach().clone()

    def resume(self, features: Tensor, inputs: Any) -> Any:
        """The model's output for ``inputs`` whose prefix gave ``features``; only what lies above is computed.

        Raises:
            VisadaptError: see :meth:`check`.
        """
        self.check()
        if torch.is_grad_enabled():
            _RESUMED.update(self.spared)
        at = _Call(self._shapes, features)
        token = _CALL.set(at)
        try:
            out = call(self.model, inputs)
        finally:
            _CALL.reset(token)
        if not at.reached:
            raise VisadaptError(
                f"{self.path}, where the cache goes on, was not called: the model takes another path now"
            )
        return out

    def close(self) -> None:
        """Gives the spared modules their classes back."""
        for module in self.spared:
            left = module.__dict__.get(PREFIX, 0) - 1
            if left > 0:
                module.__dict__[PREFIX] = left
                continue
            module.__dict__.pop(PREFIX, None)
            _RESUMED.discard(module)
            undress(module, sparing_class)
        self.spared = []


def _own_tensors(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name != "num_batches_tracked":
            yield joined(path, name), tensor


def _autocast(model: nn.Module) -> torch.dtype | None:
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _told(autocast: torch.dtype | None) -> str:
    return "without autocast" if autocast is None else f"under autocast to {autocast}"


def _cut(flow: Flow, hosts: set[str]) -> Call | None:
    """The last call before any host's whose output is all that the rest needs of what was computed before."""
    counts: dict[str, int] = {}
    for c in flow.calls:
        counts[c.path] = counts.get(c.path, 0) + 1
    inputs = {v.index for v in flow.values if v.op == "input"}
    best: Call | None = None
    for c in flow.calls:
        if c.path in hosts:
            break
        if c.output is None or counts[c.path] > 1 or c.output in c.inputs:
            continue
        if c.path == "" or any(inside(host, c.path) for host in hosts):
            continue
        cut = c.output.index
        above = [v for v in flow.values if v.index > cut]
        if above and all(p >= cut or p in inputs for v in above for p in v.parents):
            best = c
    return best


def _spared(flow: Flow, cut: Call) -> dict[str, tuple[int, ...] | None]:
    """The modules that need not be computed when going on from ``cut``, and the shape of each one's output."""
    assert cut.output is not None
    order = [c.path for c in flow.calls]
    end = max(i for i, c in enumerate(flow.calls) if inside(c.path, cut.path) or c is cut)
    later = set(order[end + 1 :])
    spared: dict[str, tuple[int, ...] | None] = {cut.path: None}
    for c in flow.calls[: order.index(cut.path)]:
        outer = inside(cut.path, c.path)
        covered = within(c.path, spared)
        if not outer and not covered and c.path not in later and c.output is not None:
            spared[c.path] = c.output.shape[1:]
    return spared
