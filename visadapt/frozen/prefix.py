"""The prefix of a task: the part of a backbone below the first site that the task trains."""

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
    """State of a forward that stops at the end of a prefix (``features`` is None), or starts there.

    Attributes:
        shapes: output shape per sample of each skipped module; None for modules whose outputs are kept.
        last: the last module of the prefix.
        features: kept outputs that the forward starts from.
        seen: outputs of the kept modules, recorded by a forward that stops.
        reached: whether the last module was called.
    """

    shapes: dict[nn.Module, tuple[int, ...] | None]
    last: nn.Module
    features: dict[nn.Module, Tensor] | None = None
    seen: dict[nn.Module, Tensor] = field(default_factory=dict)
    reached: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("visadapt_prefix", default=None)

_RESUMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that were skipped in a forward with gradients."""


class _EndOfPrefix(BaseException):
    """Ends a forward at the end of the prefix."""


@cached
def sparing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that computes nothing in a forward that starts above the module, and is unchanged otherwise."""

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
                # later modules of the prefix may write to it in place
                at.seen[self] = out if self is at.last else out.detach().clone()
            if self is at.last:
                raise _EndOfPrefix
            return out
        at.reached = at.reached or self is at.last
        # the output of a skipped module is never read, so its memory is left uninitialised
        some = at.features[at.last]
        return at.features[self] if shape is None else some.new_empty((len(some), *shape))

    return subclass(plain, sparing_class, forward=forward)


class Prefix:
    """The part of a backbone below the first host of a task; computes its output and resumes the model from it.

    Any number of prefixes may be open on one model: each forward knows the prefix that it starts from.

    Adapters that only read a module's output (those of `visadapt.Ladder`) do not end the prefix: the outputs that they
    read are kept beside the prefix's own output, and any task that reads the same outputs can start from them.

    Args:
        model: an injected model.
        task: the task; its first host and everything above are computed in every step.
        example: an input, in the form that `visadapt.sites` takes; guessed if None.

    Attributes:
        path: the last module of the prefix.
        watched: paths of the modules below it whose outputs are kept as well.

    Raises:
        VisadaptError: nothing lies below the first trained host, or the rest of the model needs more than one tensor
            from below.
    """

    def __init__(self, model: nn.Module, task: str, example: Any = None) -> None:
        self.model, self.task = unwrapped(model), task
        hosts = _roles(registry_of(model), task)
        flow, _ = trace_flow(self.model, example)
        cut = _cut(flow, hosts)
        if cut is None:
            first = next((c.path for c in flow.calls if c.path in hosts), "its first host")
            raise VisadaptError(
                f"task {task!r} trains at {first or 'the root'} already, and no single tensor lies below it, so "
                "it has no prefix to keep (where= puts adapters into late stages, norms='frozen' keeps early norms out)"
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
        """Return the parameters and buffers of the prefix, by name.

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
        """Return the path, class and options of each module of the prefix."""
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
        """Check that a task has no parts within the prefix.

        Raises:
            VisadaptError: the task has parts there (the first such host is named), or was removed.
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
        """Check that resuming gives the same result as the whole model.

        Raises:
            VisadaptError: the prefix is closed; the active task acts within it; autocast, weights, modules or hooks
                have changed since it was made.
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
                f"the cache was made {_mode(self.autocast)} and is used {_mode(_autocast(self.model))}: make it in the "
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
        """Compute the prefix's output for a batch, in eval mode.

        Returns:
            ``(N, …)``, the output of the last module; with watched modules ``(N, features)``, the flattened outputs of
            all kept modules concatenated.

        Raises:
            VisadaptError: the model did not call a kept module, or its output is not a tensor.
        """
        at = _Call(self._shapes, self._kept[-1])
        token = _CALL.set(at)
        try:
            # parts that read outputs expect the forward to finish, so no task is active
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
        """Split the features into the outputs of the kept modules."""
        if len(self._kept) == 1:
            return {self._kept[0]: features}
        parts = torch.split(features, [size.numel() for size, _ in self._sizes], 1)
        whole = [
            # in the original memory format, so that kernels round the same way
            part.reshape(len(part), *size).contiguous(memory_format=memory_format)
            for part, (size, memory_format) in zip(parts, self._sizes, strict=True)
        ]
        return dict(zip(self._kept, whole, strict=True))

    def resume(self, features: Tensor, inputs: Any) -> Any:
        """Compute the model's output for ``inputs`` from the prefix's output ``features``.

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
                f"{self.path}, from which the cache resumes, was not called: the model takes another path now"
            )
        return out

    def close(self) -> None:
        """Restore the classes of the skipped modules."""
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


def _mode(autocast: torch.dtype | None) -> str:
    return "without autocast" if autocast is None else f"under autocast to {autocast}"


def _roles(registry: Registry, task: str) -> dict[str, set[str]]:
    """Return the roles of a task's parts at each of its hosts."""
    return {path: {role(part) for part in parts.values()} for path, parts in registry.parts(task).items()}


def _cut(flow: Flow, hosts: dict[str, set[str]]) -> Call | None:
    """Return the last call before the first host whose output is the only tensor that the rest of the model needs.

    A host whose parts act on its output only may be that call itself. Hosts whose parts only read are ignored.
    """
    counts: dict[str, int] = {}
    for c in flow.calls:
        counts[c.path] = counts.get(c.path, 0) + 1
    inputs = {v.index for v in flow.values if v.op == "input"}
    watched = [path for path, roles in hosts.items() if roles == {"watch"}]
    acting = {path: roles for path, roles in hosts.items() if path not in watched}
    best: Call | None = None
    for c in flow.calls:
        # without parts that only read, the cut stays where earlier versions put it, and so do their cache files
        after = bool(watched) and acting.get(c.path, set()) == {"after"}
        usable = c.alone and c.output is not None and counts[c.path] == 1 and c.output not in c.inputs and c.path != ""
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
    """Return the modules that can be skipped when resuming from ``cut``, with the output shape of each per sample.

    Modules that contain a watched module are not skipped, so that the watched module is called.
    """
    assert cut.output is not None
    order = [c.path for c in flow.calls]
    end = max(i for i, c in enumerate(flow.calls) if inside(c.path, cut.path) or c is cut)
    later = set(order[end + 1 :])
    spared: dict[str, tuple[int, ...] | None] = {cut.path: None}
    for c in flow.calls[: order.index(cut.path)]:
        outer = any(inside(path, c.path) for path in (cut.path, *watched))
        covered = within(c.path, spared)
        # a tuple is unpacked by what calls the module, so only the modules inside are skipped
        if c.alone and not outer and not covered and c.path not in later and c.output is not None:
            spared[c.path] = None if c.path in watched else c.output.shape[1:]
    return spared
