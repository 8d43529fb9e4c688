"""The prefix cache: what lies below the first site that trains is the same in every epoch, so it is computed once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.dataflow import Call, Flow
from visadapt.backbone.fingerprint import fingerprint
from visadapt.backbone.modules import own_modules, unwrapped
from visadapt.backbone.subclass import cached, subclass
from visadapt.backbone.trace import call, trace_flow
from visadapt.errors import VisadaptError
from visadapt.runtime.host import dress, undress
from visadapt.runtime.registry import Registry, registry_of
from visadapt.runtime.selection import bare, using
from visadapt.tensor_file import raw

SPENT = "_visadapt_prefix"
"""Attribute of a module that a prefix spares: the shape of its output, or None for the one whose output is kept."""

_RESUMED: ContextVar[Tensor | None] = ContextVar("visadapt_resumed", default=None)


@cached
def sparing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that computes nothing while a forward is resumed from the prefix's output."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        features = _RESUMED.get()
        if features is None:
            return plain.forward(self, *args, **kwargs)
        shape = self.__dict__[SPENT]
        # what a spared module would give is never looked at; memory that nobody touches costs nothing
        return features if shape is None else features.new_empty((len(features), *shape))

    return subclass(plain, sparing_class, forward=forward)


class Prefix:
    """The part of a backbone below the first host of a task, and how to go on from its output.

    Args:
        model: an injected model.
        task: the task; what its first host computes, and everything above, runs anew in every step.
        example: an input, as :func:`visadapt.sites` takes it; guessed if None.

    Raises:
        VisadaptError: nothing lies below the first trained host, or what lies above needs more of it than one tensor.
    """

    def __init__(self, model: nn.Module, task: str, example: Any = None) -> None:
        self.model, self.task = unwrapped(model), task
        registry = registry_of(model)
        hosts = set(registry.task(task).hosts)
        flow, _ = trace_flow(self.model, example)
        cut = _cut(flow, hosts)
        if cut is None:
            first = next((c.path for c in flow.calls if c.path in hosts), "its first host")
            raise VisadaptError(
                f"task {task!r} trains at {first or 'the root'} already, and no single tensor lies below it: there "
                "is no prefix to keep (where= puts adapters into late stages, norms='frozen' keeps early norms out)"
            )
        self.path = cut.path
        self._spare(flow, cut, hosts)

    def _spare(self, flow: Flow, cut: Call, hosts: set[str]) -> None:
        assert cut.output is not None
        order = [c.path for c in flow.calls]
        end = max(i for i, c in enumerate(flow.calls) if c.path.startswith(f"{cut.path}.") or c is cut)
        later = set(order[end + 1 :])
        spared: dict[str, tuple[int, ...] | None] = {cut.path: None}
        for c in flow.calls[: order.index(cut.path)]:
            outer = c.path == "" or cut.path.startswith(f"{c.path}.")
            covered = any(c.path.startswith(f"{path}.") for path in spared)
            if not outer and not covered and c.path not in later and c.output is not None:
                spared[c.path] = c.output.shape[1:]
        modules = own_modules(self.model)
        for path, shape in spared.items():
            modules[path].__dict__[SPENT] = shape
            dress(modules[path], sparing_class)
        self.spared = [modules[path] for path in spared]

    @torch.no_grad()
    def compute(self, inputs: Any) -> Tensor:
        """The prefix's output for a batch, in eval mode."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            kept.append(out.detach().clone())
            raise _EnoughError

        handle = self.model.get_submodule(self.path).register_forward_hook(keep)
        try:
            with bare(self.model), using(self.model, self.task):
                call(self.model, inputs)
        except _EnoughError:
            pass
        finally:
            handle.remove()
        return kept[0]

    def resume(self, features: Tensor, inputs: Any) -> Any:
        """What the model gives for ``inputs`` whose prefix gave ``features``; only what lies above is computed."""
        token = _RESUMED.set(features)
        try:
            return call(self.model, inputs)
        finally:
            _RESUMED.reset(token)

    def close(self) -> None:
        """Gives the spared modules their classes back."""
        for module in self.spared:
            if module.__dict__.pop(SPENT, "none") != "none":
                undress(module, sparing_class)
        self.spared = []


class _EnoughError(Exception):
    """Ends a forward once the prefix is through."""


def _cut(flow: Flow, hosts: set[str]) -> Call | None:
    """The last call before any host's whose output is all that the rest needs of what was computed before."""

    def holds_host(path: str) -> bool:
        return path in hosts or any(host.startswith(f"{path}.") for host in hosts) or path == ""

    counts: dict[str, int] = {}
    for c in flow.calls:
        counts[c.path] = counts.get(c.path, 0) + 1
    best: Call | None = None
    for c in flow.calls:
        if c.path in hosts:
            break
        if c.output is None or holds_host(c.path) or counts[c.path] > 1 or c.output in c.inputs:
            continue
        cut = c.output.index
        inputs = {v.index for v in flow.values if v.op == "input"}
        above = [v for v in flow.values if v.index > cut]
        if above and all(p >= cut or p in inputs for v in above for p in v.parents):
            best = c
    return best


@dataclass
class Resumable:
    """A batch whose prefix is known; the training loop goes on from there."""

    prefix: Prefix
    features: Tensor
    inputs: Any

    def resume(self) -> Any:
        """The model's output."""
        return self.prefix.resume(self.features, self.inputs)


class CachedPrefix:
    """Prefix outputs of a whole data set; what :func:`cache_prefix` returns. Give it to ``fit`` as ``prepare``.

    Attributes:
        prefix: the part of the backbone whose outputs these are.
        features: ``(views, N, …)``, in memory or memory-mapped.
        rows: ``(N,)`` int64, the inputs to train on: ``fit(model, task, (cached.rows, labels), prepare=cached)``.
    """

    def __init__(self, prefix: Prefix, features: Tensor, inputs: Any, prepare: Callable[[Any], Any]) -> None:
        self.prefix, self.features, self._inputs, self._prepare = prefix, features, inputs, prepare
        self.rows = torch.arange(features.shape[1])

    def __call__(self, rows: Tensor) -> Resumable:
        """The batch of these rows; each in one of its views, drawn anew."""
        index = rows.cpu()
        view = torch.randint(len(self.features), (len(index),))
        device = next(self.prefix.model.parameters()).device
        features = self.features[view, index].to(device)
        # the model's own inputs pass through what is functional before the cut; their values no longer matter there
        return Resumable(self.prefix, features, self._prepare(_take(self._inputs, index)))


def cache_prefix(
    model: nn.Module,
    task: str,
    inputs: Any,
    *,
    prepare: Callable[[Any], Any] | None = None,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    views: int = 1,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    limit: float = 4e9,
    batch_size: int = 64,
) -> CachedPrefix:
    """Computes once what lies below the first site that a task trains, so that later epochs run the rest only.

    Args:
        model: an injected model whose task trains in late stages only.
        task: its name.
        inputs: all training inputs: a tensor ``(N, …)`` or a dict of such tensors.
        prepare: makes what the model takes of a batch of inputs, as in ``fit``; None takes them as they are.
        augment: changes a batch, given a generator; then ``views`` versions of each sample are kept.
        views: how many.
        seed: of the augmentation, which is the same whenever the cache is made again.
        file: where to keep the features, memory-mapped; reused if model, data and views are the same. None: in memory.
        limit: bytes that the features may take.
        batch_size: samples a forward while the cache is made.

    Returns:
        The cache.

    Raises:
        VisadaptError: there is no prefix to keep; the features would pass the limit; the model does not give the same
            from the cache as without (then it draws random numbers, or its prefix is more than one tensor).

    Example:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3, where="layer4", norms="frozen")
        >>> images = torch.randn(4, 3, 32, 32)
        >>> cached = visadapt.cache_prefix(model, "flowers", images)
        >>> cached.features.shape[:2]  # views, samples
        torch.Size([1, 4])
    """
    ready: Callable[[Any], Any] = prepare or (lambda batch: batch)
    count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    if views < 1 or (views > 1 and augment is None):
        needs = "needs an augment that makes them differ" if views > 1 else "is no number of views: 1 or more"
        raise VisadaptError(f"views={views} {needs}")
    first = ready(_take(inputs, torch.arange(min(2, count))))
    prefix = Prefix(model, task, first if isinstance(first, Tensor | dict | tuple) else None)
    try:
        sample = prefix.compute(first)
        _check(prefix, first, sample)
        shape = (views, count, *sample.shape[1:])
        size = math.prod(shape) * sample.element_size()
        if size > limit:
            raise VisadaptError(
                f"the outputs of {prefix.path} take {size / 1e9:.3g} GB, more than limit={limit / 1e9:.3g} GB"
            )
        key = _key(registry_of(model), prefix, inputs, first, views, seed)
        features, done = _storage(file, shape, sample.dtype, key)
        if not done:
            noise = torch.Generator().manual_seed(seed)
            for view in range(views):
                for start in range(0, count, batch_size):
                    batch = _take(inputs, torch.arange(start, min(start + batch_size, count)))
                    batch = batch if augment is None else augment(batch, noise)
                    features[view, start : start + batch_size] = prefix.compute(ready(batch)).cpu()
            _finish(file, key)
    except BaseException:
        prefix.close()
        raise
    return CachedPrefix(prefix, features, inputs, ready)


def _take(inputs: Any, index: Tensor) -> Any:
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]


@torch.no_grad()
def _check(prefix: Prefix, inputs: Any, features: Tensor) -> None:
    with bare(prefix.model), using(prefix.model, prefix.task):
        outs = call(prefix.model, inputs), prefix.resume(features, inputs)
    expected, found = (cast("Tensor", getattr(out, "logits", out)) for out in outs)
    if not torch.equal(expected, found):
        raise VisadaptError(f"going on from {prefix.path} does not give what the whole model gives: it cannot be kept")


def _key(registry: Registry, prefix: Prefix, inputs: Any, first: Any, views: int, seed: int) -> str:
    """Backbone, data, transform and place: a cache of other ones is another."""
    digest = hashlib.sha256()
    parts = [*(inputs.values() if isinstance(inputs, dict) else [inputs])]
    parts += [*(first.values() if isinstance(first, dict) else first if isinstance(first, tuple) else [first])]
    for part in parts:
        digest.update(str((part.dtype, tuple(part.shape))).encode())
        digest.update(raw(part))
    description = [fingerprint(prefix.model, known=registry.digests), prefix.path, views, seed, digest.hexdigest()]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def _storage(file: Any, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> tuple[Tensor, bool]:
    if file is None:
        return torch.empty(shape, dtype=dtype), False
    path, mark = Path(file), Path(f"{file}.key")
    count = math.prod(shape)
    whole = path.is_file() and path.stat().st_size == count * dtype.itemsize
    done = whole and mark.is_file() and mark.read_text() == key
    if not done:
        mark.unlink(missing_ok=True)
    try:
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape), done
    except (OSError, RuntimeError) as error:
        raise VisadaptError(f"cannot keep {dtype} features in {path}: {error}") from error


def _finish(file: Any, key: str) -> None:
    """The key is written last: a cache that was cut short has none, and is made again."""
    if file is not None:
        Path(f"{file}.key").write_text(key)
