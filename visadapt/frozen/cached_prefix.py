"""The prefix cache: outputs below the first trained site are the same in every epoch, so they are computed once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from visadapt.arguments import reading, takes
from visadapt.backbone.fingerprint import fingerprint
from visadapt.backbone.modules import last_name, parent, unwrapped
from visadapt.backbone.trace import call
from visadapt.checks import check_count
from visadapt.errors import VisadaptError
from visadapt.frozen.cache_file import CacheFile
from visadapt.frozen.prefix import Prefix
from visadapt.printable import shown
from visadapt.runtime.registry import registry_of
from visadapt.runtime.selection import bare
from visadapt.tensor_file import raw

Prepare = Callable[[Any], Any]
Augment = Callable[[Any, torch.Generator], Any]


@dataclass
class Resumable:
    """A batch whose prefix was computed before; the training loop computes the rest."""

    prefix: Prefix
    features: Tensor
    inputs: Any

    def resume(self) -> Any:
        """The model's output for the active task.

        Raises:
            VisadaptError: the cache belongs to another task, or the model has changed; see `Prefix.check`.
        """
        return self.prefix.resume(self.features, self.inputs)


class CachedPrefix:
    """Prefix outputs of a whole data set, made by `cache_prefix`. Pass it to ``fit`` as ``prepare``.

    Attributes:
        prefix: the part of the backbone that computed these outputs; ``prefix.close()`` restores the model.
        features: ``(views, N, …)``, in memory or mapped from a file.
        rows: ``(N,)`` int64, the inputs to train on: ``fit(model, task, (cached.rows, labels), prepare=cached)``.
        identity: the origin of the features, as JSON values: place, autocast, views, and a digest of all inputs.
    """

    def __init__(self, source: _Source, features: Tensor) -> None:
        self.prefix, self.features, self.identity = source.prefix, features, source.identity()
        self._inputs, self._prepare, self._shape = source.inputs, source.ready, source.shape
        self.rows = torch.arange(features.shape[1])

    def __call__(self, rows: Tensor) -> Resumable:
        """Return the batch of these rows, each in one of its views, chosen at random in every call.

        Args:
            rows: ``(n,)`` int64, some of the attribute ``rows``.

        Raises:
            VisadaptError: the rows are not indices into the cache; ``prepare`` returns other shapes than when the cache
                was made.
        """
        count = self.features.shape[1]
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise VisadaptError(
                f"the input of a model with a cache must be some of the cache's rows, int64 of shape (n,), got {got}"
            )
        index = rows.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise VisadaptError(
                f"rows of the cache must be from 0 to {count - 1}, got {int(index.min())} to {int(index.max())}"
            )
        view: Any = 0 if len(self.features) == 1 else torch.randint(len(self.features), (len(index),))
        device = next(self.prefix.model.parameters()).device
        features = self.features[view, index].to(device)
        # functional code before the cut still runs on the model's inputs; only their shapes matter there
        inputs = self._prepare(_take(self._inputs, index))
        if _shapes(inputs) != self._shape:
            raise VisadaptError(
                f"prepare gives inputs of shape {_shapes(inputs)} per sample and gave {self._shape} when the cache was "
                "made: pad or crop all inputs to one size"
            )
        return Resumable(self.prefix, features, inputs)

    @takes()
    def check(self, model: nn.Module, task: str | None) -> None:
        """Check that the cache was made for this model and task.

        If the cache keeps outputs for adapters that only read them, any task that reads the same outputs may use it.

        Raises:
            VisadaptError: the cache belongs to another model or task.
        """
        if unwrapped(model) is not self.prefix.model:
            raise VisadaptError(f"prepare is a cache of another model: make one with cache_prefix(model, {task!r}, …)")
        if task is not None and self.prefix.watched:
            self.prefix.check_task(task, "the cache")
        elif task != self.prefix.task:
            raise VisadaptError(
                f"prepare is a cache of task {self.prefix.task!r}, and {task!r} is to be trained: make one with "
                f"cache_prefix(model, {task!r}, …)"
            )


@takes("views", "batch_size", "task")
def cache_prefix(
    model: nn.Module,
    task: str,
    inputs: Any,
    *,
    prepare: Prepare | None = None,
    augment: Augment | None = None,
    views: int = 1,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    limit: float = 4e9,
    batch_size: int = 64,
) -> CachedPrefix:
    """Compute the outputs below the first site that a task trains once, so that later epochs run only the rest.

    The prefix runs in eval mode: dropout below that site is off. Use the cache in the autocast context that it was made
    in. Several caches may be open on one model.

    An existing file is reused if it is complete and was made from the same backbone, place in it, autocast, views and
    inputs (all inputs are prepared and augmented again, and their digest is compared with the one in the file).
    Otherwise a new file is written and replaces it.

    Args:
        model: an injected model whose task trains in late stages only.
        task: its name.
        inputs: all training inputs: a tensor ``(N, …)`` or a dict of such tensors.
        prepare: turns a batch of inputs into the model's arguments, as in ``fit``; None passes inputs unchanged.
        augment: changes a batch, given a generator; ``views`` versions of each sample are then kept.
        views: number of versions of each sample.
        seed: seed of the augmentation, so that it is the same whenever the cache is made again.
        file: path of a file for the features, mapped into memory; a small ``<file>.key`` beside it records their
            origin. Other programs may replace it while it is in use, but not shorten it. None keeps them in memory.
        limit: largest size of the features, in bytes.
        batch_size: samples per forward while the cache is made.

    Returns:
        The cache.

    Raises:
        VisadaptError: the model has no prefix to keep; the features would exceed the limit; the disk is full; the
            model's output with the cache differs from its output without (it draws random numbers, its prefix is more
            than one tensor, or its output for one sample depends on the others in the batch).

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3, where="layer4", norms="frozen")
        >>> images = torch.randn(4, 3, 32, 32)
        >>> cached = visadapt.cache_prefix(model, "flowers", images)
        >>> cached.features.shape[:2]  # views, samples
        torch.Size([1, 4])
    """
    ready: Prepare = prepare or (lambda batch: batch)
    count = _count(inputs)
    check_count(batch_size, "batch_size")
    if isinstance(views, bool) or not isinstance(views, int) or views < 1 or (views > 1 and augment is None):
        several = isinstance(views, int) and views > 1
        needs = "needs an augment that makes them differ" if several else "must be a positive integer: 1 or more"
        raise VisadaptError(f"views={shown(views)} {needs}")
    # the kept features may be used in training, so they must not be inference tensors
    with torch.inference_mode(False), torch.no_grad():
        first = ready(_take(inputs, torch.arange(min(2, count))))
        prefix = Prefix(model, task, first if isinstance(first, Tensor | dict | tuple) else None)
        try:
            sample = prefix.compute(first)
            _check(prefix, first, sample)
            _check_alone(prefix, ready(_take(inputs, torch.arange(1))), sample, min(2, count))
            source = _Source(prefix, inputs, ready, augment, views, seed, batch_size, _shapes(first), sample)
            features = _kept(source, count, file, limit)
        except BaseException:
            prefix.close()
            raise
    return CachedPrefix(source, features)


@dataclass
class _Source:
    """The inputs of a cache and how its features are computed from them.

    Attributes:
        shape: shapes of one prepared sample.
        sample: the features of the first samples, without augmentation.
        digest: digest of all prepared inputs, set by the last complete pass over them.
    """

    prefix: Prefix
    inputs: Any
    ready: Prepare
    augment: Augment | None
    views: int
    seed: int
    batch_size: int
    shape: Any
    sample: Tensor
    digest: str = ""

    def batches(self) -> Iterator[Any]:
        """Yield the prepared inputs, batch by batch, view by view."""
        noise, digest = torch.Generator().manual_seed(self.seed), hashlib.sha256()
        count = _count(self.inputs)
        for _ in range(self.views):
            for start in range(0, count, self.batch_size):
                batch = _take(self.inputs, torch.arange(start, min(start + self.batch_size, count)))
                made = self.ready(batch if self.augment is None else self.augment(batch, noise))
                if _shapes(made) != self.shape:
                    raise VisadaptError(
                        f"one batch has inputs of shape {_shapes(made)} per sample and another {self.shape}: prepare "
                        "and augment must keep all inputs at one size"
                    )
                _add(digest, made)
                yield made
        self.digest = digest.hexdigest()

    def features(self) -> Iterator[Tensor]:
        """Yield the features of all batches in order."""
        for batch in self.batches():
            part = self.prefix.compute(batch).cpu().contiguous()
            if part.shape[1:] != self.sample.shape[1:] or part.dtype != self.sample.dtype:
                raise VisadaptError(
                    f"{self.prefix.path} gives {part.dtype} {tuple(part.shape[1:])} for one batch and "
                    f"{self.sample.dtype} {tuple(self.sample.shape[1:])} for another: that cannot be kept"
                )
            yield part

    def identity(self) -> dict[str, Any]:
        """Return the origin of the features except the backbone's weights, as JSON values."""
        lean = registry_of(self.prefix.model).lean
        return {
            "place": " ".join((*self.prefix.watched, self.prefix.path)),
            "structure": hashlib.sha256("\n".join(self.prefix.structure()).encode()).hexdigest(),
            "autocast": str(self.prefix.autocast),
            "device": self.sample.device.type,
            "views": self.views,
            "seed": self.seed,
            "inputs": self.digest,
            **({"precision": lean.told} if lean is not None and lean.told else {}),
        }

    def weights(self) -> dict[str, Any]:
        """Return digests of the backbone, block by block, and of the prefix's buffers outside its state dict."""
        buffers = hashlib.sha256()
        for name, tensor in self.prefix.tensors().items():
            if last_name(name) in _module(self.prefix.model, name)._non_persistent_buffers_set:
                buffers.update(name.encode())
                buffers.update(raw(tensor))
        # computed anew, not taken from the registry, which does not see every write through .data
        return {"backbone": fingerprint(self.prefix.model), "buffers": buffers.hexdigest()}

    def gave(self, features: Tensor) -> bool:
        """Return whether features from a file equal the model's for the first samples, up to rounding."""
        return self.augment is not None or _close(features[0, : len(self.sample)], self.sample.cpu())


def _kept(source: _Source, count: int, file: Any, limit: float) -> Tensor:
    sample = source.sample
    shape = (source.views, count, *sample.shape[1:])
    size = math.prod(shape) * sample.element_size()
    if size > limit:
        raise VisadaptError(
            f"the outputs of {source.prefix.path} take {size / 1e9:.3g} GB, more than limit={limit / 1e9:.3g} GB"
        )
    if file is None:
        flat, start = torch.empty(shape, dtype=sample.dtype).view(-1, *sample.shape[1:]), 0
        for part in source.features():
            flat[start : start + len(part)] = part
            start += len(part)
        return flat.view(shape)
    kept, weights = CacheFile(file, shape, sample.dtype), source.weights()

    def identity() -> dict[str, Any]:
        return {**weights, **source.identity()}

    def reused() -> Tensor | None:
        if not kept.might_be({k: v for k, v in identity().items() if k != "inputs"}):
            return None
        for _ in source.batches():
            pass
        found = kept.read(identity())
        return found if found is not None and source.gave(found) else None

    found = reused()
    if found is not None:
        return found
    with kept.writing() as writer:
        # another process may have written it while this one waited for the lock
        found = reused()
        return writer.write(source.features(), identity) if found is None else found


def _add(digest: hashlib._Hash, batch: Any) -> None:
    leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            digest.update(raw(leaf))
        else:
            digest.update(repr(leaf).encode())


def _shapes(batch: Any) -> list[list[int]]:
    return [list(leaf.shape[1:]) for leaf in _tensors(batch)]


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(parent(name))


@reading("inputs")
def _count(inputs: Any) -> int:
    named = {f"inputs[{k!r}]": v for k, v in inputs.items()} if isinstance(inputs, Mapping) else {"inputs": inputs}
    other = next((name for name, column in named.items() if not isinstance(column, Tensor) or not column.ndim), "")
    if other or not named:
        got = f"{other} = {named[other]!r:.60}" if isinstance(inputs, Mapping) and other else type(inputs).__name__
        hint = "; prepare= can add what is not of one sample" if isinstance(inputs, Mapping) and other else ""
        raise VisadaptError(f"inputs must be a tensor (N, …) or a dict of such tensors, got {got}{hint}")
    columns = list(named.values())
    counts = {len(column) for column in columns}
    if len(counts) > 1 or 0 in counts:
        raise VisadaptError(f"inputs must be of one length of 1 or more, got {', '.join(map(str, sorted(counts)))}")
    return counts.pop()


def _take(inputs: Any, index: Tensor) -> Any:
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]


def _check(prefix: Prefix, inputs: Any, features: Tensor) -> None:
    refusal = f"resuming from {prefix.path} does not give what the whole model gives: it cannot be kept"
    with bare(prefix.model, prefix.task):
        expected = _tensors(call(prefix.model, inputs))
        try:
            # cloned: the rest of the model may write to it, as an in-place ReLU does
            found = _tensors(prefix.resume(features.clone(), inputs))
        except VisadaptError:
            raise
        except Exception as error:
            raise VisadaptError(f"{refusal} ({type(error).__name__}: {error})") from error
    alike = len(expected) == len(found) and len(expected) > 0
    if not alike or not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
        raise VisadaptError(refusal)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]


def _check_alone(prefix: Prefix, inputs: Any, features: Tensor, count: int) -> None:
    """Check that the prefix has one row per sample, and that its output for a sample does not depend on the others."""
    alone = prefix.compute(inputs)
    rows = features.ndim > 0 and len(features) == count and alone.shape == (1, *features.shape[1:])
    if not rows or not _close(alone[0], features[0]):
        raise VisadaptError(
            f"the output of {prefix.path} for one sample, {tuple(alone.shape)}, is not its row of the output for "
            f"{count}, {tuple(features.shape)}: it cannot be kept sample by sample"
        )


def _close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, which may differ with the batch size."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    exact = expected.device.type == "cpu"
    most = {torch.float64: 1e-9, torch.float32: 1e-3 if exact else 1e-2}.get(expected.dtype, 0.1)
    error, largest = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    return bool(error <= most * largest)
