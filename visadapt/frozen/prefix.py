"""The prefix of a task: what a backbone computes below the first site that the task trains, and going on from there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.dataflow import Call, Flow
from visadapt.backbone.modules import PREFIX, ancestors, inside, joined, own_modules, unwrapped, within
from visadapt.backbone.subclass import cached, plain_class, subclass
from visadapt.backbone.trace import call, trace_flow
from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError
from visadapt.frozen.bits import format_of
from visadapt.frozen.checksums import Checksums
from visadapt.runtime.choice import AUTO
from visadapt.runtime.host import dress, undress
from visadapt.runtime.registry import Registry, registry_of
from visadapt.runtime.roles import role
from visadapt.runtime.selection import bare


@dataclass(eq=False)
class _Call:
    """A forward that stops at the end of a prefix (``features`` is None), or starts there.

    Attributes:
        shapes: the spared modules, and the shape of what each gives for one sample; None for those that are kept.
        last: the last module of the prefix.
        features: what the kept modules gave, to go on from.
        seen: what the kept modules give in a forward that stops.
        reached: whether the last module was called.
    """

    shapes: dict[nn.Module, tuple[int, ...] | None]
    last: nn.Module
    features: dict[nn.Module, Tensor] | None = None
    seen: dict[nn.Module, Tensor] = field(default_factory=dict)
    reached: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("visadapt_prefix", default=None)

_RESUMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that were spared in a forward with gradients."""


class _EndOfPrefix(BaseException):
    """Ends a forward once the prefix is through."""


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
            if shape is None and isinstance(out, Tensor):
                # what comes later in the prefix may write to it
                at.seen[self] = out if self is at.last else out.detach().clone()
            if self is at.last:
                raise _EndOfPrefix
            return out
        at.reached = at.reached or self is at.last
        # the output of a spared module is never read, so its memory is left as it is
        some = at.features[at.last]
        return at.features[self] if shape is None else some.new_empty((len(some), *shape))

    return subclass(plain, sparing_class, forward=forward)


class Prefix:
    """The part of a backbone below the first host of a task, and how to go on from its output.

    Any number of prefixes may be open on one model: which one per forward starts from is known to that forward only.

    Args:
        model: an injected model.
        task: the task; its first host and everything above are computed in every step.
        example: an input, as `visadapt.sites` takes it; guessed if None.

    Parts that only watch what a module gives (a `visadapt.Ladder`'s) do not end it: what they watch is kept
    beside the prefix's output, and any task that watches the same goes on from it.

    Attributes:
        path: the last module of the prefix.
        watched: paths of the modules below it whose outputs are kept as well.

    Raises:
        VisadaptError: nothing lies below the first trained host, or what lies above needs more of it than one tensor.
    """

    def __init__(self, model: nn.Module, task: str, example: Any = None) -> None:
        self.model, self.task = unwrapped(model), task
        hosts = _roles(registry_of(model), task)
        flow, _ = trace_flow(self.model, example)
        cut = _cut(flow, hosts)
        if cut is None:
            first = next((c.path for c in flow.calls if c.path in hosts), "its first host")
            raise VisadaptError(
                f"task {task!r} trains at {first or 'the root'} already, and no single tensor lies below it: there "
                "is no prefix to keep (where= puts adapters into late stages, norms='frozen' keeps early norms out)"
            )
        self.path = cut.path
        below = {c.path for c in flow.calls[: flow.calls.index(cut)]}
        self.watched = tuple(path for path, roles in hosts.items() if roles == {"watch"} and path in below)
        shapes = _spared(flow, cut, self.watched)
        modules = own_modules(self.model)
        self._kept = [modules[path] for path in (*self.watched, cut.path)]
        self._sizes: list[tuple[torch.Size, torch.memory_format]] = []
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
        """Refuse a task that has parts within the prefix, or that is gone.

        Raises:
            VisadaptError: its first such host is named.
        """
        for path, roles in _roles(registry_of(self.model), task).items():
            if (roles == {"watch"} and path in self.watched) or (roles <= {"watch", "after"} and path == self.path):
                continue
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
        """The prefix's output for a batch, in eval mode; with watched modules ``(N, …)`` of all outputs side by side.

        Raises:
            VisadaptError: the model did not call the last module of the prefix, or that did not give a tensor.
        """
        at = _Call(self._shapes, self._kept[-1])
        token = _CALL.set(at)
        try:
            # what watches would wait in vain for the forward to go on
            with bare(self.model, None if self.watched else self.task):
                call(self.model, inputs)
        except _EndOfPrefix:
            pass
        finally:
            _CALL.reset(token)
        found = [at.seen.get(module) for module in self._kept]
        tensors = [out for out in found if out is not None]
        for path, out in zip((*self.watched, self.path), found, strict=True):
            if out is None:
                raise VisadaptError(f"{path} gave no tensor when the model ran: its output cannot be kept")
            if out.dtype != tensors[0].dtype:
                raise VisadaptError(
                    f"{path} gives {out.dtype} and others {tensors[0].dtype}: they cannot be kept as one"
                )
        if len(tensors) == 1:
            return tensors[0].detach().clone()
        self._sizes = [(out.shape[1:], format_of(out)) for out in tensors]
        return torch.cat([out.flatten(1) for out in tensors], 1)

    def _apart(self, features: Tensor) -> dict[nn.Module, Tensor]:
        """What each kept module gave."""
        if len(self._kept) == 1:
            return {self._kept[0]: features}
        parts = torch.split(features, [size.numel() for size, _ in self._sizes], 1)
        whole = [
            # as it was, so that kernels round as they did
            part.reshape(len(part), *size).contiguous(memory_format=memory_format)
            for part, (size, memory_format) in zip(parts, self._sizes, strict=True)
        ]
        return dict(zip(self._kept, whole, strict=True))

    def resume(self, features: Tensor, inputs: Any) -> Any:
        """The model's output for ``inputs`` whose prefix gave ``features``; only what lies above is computed.

        Raises:
            VisadaptError: see `check`.
        """
        self.check()
        if torch.is_grad_enabled():
            _RESUMED.update(self.spared)
        at = _Call(self._shapes, self._kept[-1], self._apart(features))
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
        """Give the spared modules their classes back."""
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
    return torch.get_autocast_dtype(device) if is_autocast(device) else None


def _told(autocast: torch.dtype | None) -> str:
    return "without autocast" if autocast is None else f"under autocast to {autocast}"


def _roles(registry: Registry, task: str) -> dict[str, set[str]]:
    """How a task's parts act at each of its hosts."""
    return {path: {role(part) for part in parts.values()} for path, parts in registry.parts(task).items()}


def _cut(flow: Flow, hosts: dict[str, set[str]]) -> Call | None:
    """The last call before any host's whose output is all that the rest needs of what was computed before.

    A host whose parts act on its output alone may be that call itself. Those that only watch are passed by.
    """
    counts: dict[str, int] = {}
    for c in flow.calls:
        counts[c.path] = counts.get(c.path, 0) + 1
    inputs = {v.index for v in flow.values if v.op == "input"}
    watched = [path for path, roles in hosts.items() if roles == {"watch"}]
    acting = {path: roles for path, roles in hosts.items() if path not in watched}
    best: Call | None = None
    for c in flow.calls:
        # a cut where nothing is watched stays where it was before there were parts that watch
        after = bool(watched) and acting.get(c.path, set()) == {"after"}
        usable = c.output is not None and counts[c.path] == 1 and c.output not in c.inputs and c.path != ""
        if usable and (after or c.path not in acting) and not any(inside(host, c.path) for host in acting):
            assert c.output is not None
            cut = c.output.index
            above = [v for v in flow.values if v.index > cut]
            if above and all(p >= cut or p in inputs for v in above for p in v.parents):
                best = c
        if c.path in acting:
            break
    return best


def _spared(flow: Flow, cut: Call, watched: tuple[str, ...]) -> dict[str, tuple[int, ...] | None]:
    """The modules that need not be computed when going on from ``cut``, and the shape of each one's output.

    Those that hold a watched module run, so that it is called.
    """
    assert cut.output is not None
    order = [c.path for c in flow.calls]
    end = max(i for i, c in enumerate(flow.calls) if inside(c.path, cut.path) or c is cut)
    later = set(order[end + 1 :])
    spared: dict[str, tuple[int, ...] | None] = {cut.path: None}
    for c in flow.calls[: order.index(cut.path)]:
        outer = any(inside(path, c.path) for path in (cut.path, *watched))
        covered = within(c.path, spared)
        if not outer and not covered and c.path not in later and c.output is not None:
            spared[c.path] = None if c.path in watched else c.output.shape[1:]
    return spared
