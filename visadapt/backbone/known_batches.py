"""Row facts of every kind of batch that a model has run, each found once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from visadapt.backbone.batch import Axis, Key, is_cache, leaves
from visadapt.backbone.entry import WHOLE, Entry
from visadapt.backbone.examine import examine
from visadapt.backbone.rows import HostRows, RowFacts, both_hosts, shape_of
from visadapt.backbone.shared_pass import SharedPass, find_shared
from visadapt.errors import VisadaptError

_TRIES = 3
"""How many batches of a kind are examined until one holds two samples whose outputs differ."""

_Known = TypeVar("_Known")

_MOST = 1024
"""How many facts of one sort are kept."""


class KnownBatches:
    """Row facts of one entry, by signature of the batch: structure, dtypes and sizes other than the number of samples.

    If two batches that differ only in their sizes have the same facts, these facts are used for every size. For larger
    numbers of samples they are found once more (see `visadapt.backbone.rows.RowFacts.covers`), as a model may order
    large batches otherwise than small ones. Equal facts of one structure share these numbers.

    Args:
        entry: the method that is called with the batches.

    Attributes:
        entry: that method.
        hosts: facts that hold for all batches so far, by path of the module.
    """

    def __init__(self, entry: Entry = WHOLE) -> None:
        self.entry = entry
        self.hosts: dict[str, HostRows] = {}
        self._exact: dict[Any, RowFacts] = {}
        self._general: dict[Any, RowFacts] = {}
        self._first: dict[Any, RowFacts] = {}
        self._kinds: dict[Any, RowFacts] = {}
        self._sized: dict[Any, RowFacts] = {}
        self._tries: dict[Any, int] = {}
        self._single: dict[Any, dict[Key, Axis] | None] = {}
        self._shared: dict[Any, SharedPass | None] = {}

    def facts(
        self, model: nn.Module, given: tuple[Any, Any], samples: int, several: bool, classes: int | None
    ) -> RowFacts:
        """Return the facts of a batch; a new kind of batch is examined first.

        Args:
            model: the backbone.
            given: ``(args, kwargs)`` of its call.
            samples: N, the number of tasks that were named.
            several: whether these are different tasks, so that the owner of each row matters.
            classes: number of classes of the backbone's own head.

        Raises:
            VisadaptError: the batch cannot be split into N samples, or the output for one sample depends on the others.
        """
        pattern, exact = _signature(given, samples, bool(model.__dict__["training"]))
        found = self._exact.get(exact) or self._general.get(pattern)
        if found is not None and (found.evidence or not several or self._tries.get(exact, 0) >= _TRIES):
            if found.covers(samples) or not several or not found.evidence or found.reordered or _is_fake(given):
                return found
            # facts of all sizes are found once per number of samples, not once per size as well
            key = (pattern if found is self._general.get(pattern) else exact, samples)
            return self._sized.get(key) or self._resized(model, given, found, key, classes)
        kind = (pattern[0], *(key for key, _ in leaves(given)))
        if _is_fake(given) and kind in self._kinds:
            # fake tensors have no values to compare
            return self._kinds[kind]
        found = examine(model, given, samples, classes, self.entry)
        twin = self._kinds.get(kind)
        if twin is not None and found.evidence and not found.reordered and shape_of(twin) == shape_of(found):
            twin.sizes.update(found.sizes)
            found = replace(found, sizes=twin.sizes)
        _keep(self._tries, exact, self._tries.get(exact, 0) + 1)
        _keep(self._exact, exact, found)
        if found.evidence and not found.reordered:
            self._kinds[kind] = found
            first = self._first.setdefault(pattern, found)
            if first is not found and shape_of(first) == shape_of(found):
                self._general[pattern] = found
            for path, host in found.hosts.items():
                self.hosts[path] = both_hosts(self.hosts[path], host) if path in self.hosts else host
        return found

    def _resized(
        self, model: nn.Module, given: tuple[Any, Any], found: RowFacts, key: tuple[Any, int], classes: int | None
    ) -> RowFacts:
        """Return the facts of another number of samples than those that facts were found for."""
        other = examine(model, given, key[1], classes, self.entry)
        if other.evidence and shape_of(other) != shape_of(found):
            return _keep(self._sized, key, other)
        found.sizes.add(key[1])
        return found

    def single(
        self, model: nn.Module, given: tuple[Any, Any], samples: int, classes: int | None
    ) -> dict[Key, Axis] | None:
        """Find where the sample lies in a batch of one sample for which ``samples`` tasks were named; None for others.

        Args:
            model: the backbone.
            given: ``(args, kwargs)``.
            samples: how many tasks were named.
            classes: width of the backbone's own head.
        """
        if samples == 1 or not any(isinstance(leaf, Tensor) and 1 in leaf.shape for _, leaf in leaves(given)):
            return None
        kind = _signature(given, samples, bool(model.__dict__["training"]))[1]
        with suppress(KeyError):
            return self._single[kind]
        try:
            cut = self.facts(model, given, samples, True, classes).cut
        except VisadaptError:
            try:
                found = self.facts(model, given, 1, False, classes)
            except VisadaptError:
                return None
            return _keep(self._single, kind, found.cut)
        self._refuse_both(model, given, cut, samples, classes)
        return _keep(self._single, kind, None)

    def _refuse_both(
        self, model: nn.Module, given: tuple[Any, Any], cut: dict[Key, Axis], samples: int, classes: int | None
    ) -> None:
        """Refuse a batch that may hold one sample just as well as ``samples`` along another axis.

        Raises:
            VisadaptError: it may.
        """
        shapes = [tuple(leaf.shape) for key, leaf in leaves(given) if isinstance(leaf, Tensor) and cut.get(key)]
        if not any(shape[0] == 1 for shape in shapes):
            return
        try:
            self.facts(model, given, 1, False, classes)
        except VisadaptError:
            return
        raise VisadaptError(
            f"{samples} tasks were named for a tensor of shape {shapes[0]}, which may be one sample or {samples}: run "
            "one task at a time"
        )

    def shared(
        self,
        model: nn.Module,
        given: tuple[Any, Any],
        facts: RowFacts,
        tasks: frozenset[Any],
        roles: Callable[[], Mapping[str, frozenset[str]]],
    ) -> SharedPass | None:
        """Where several tasks of a batch of one sample begin to differ, if they can part there.

        Args:
            model: the backbone.
            given: ``(args, kwargs)``.
            facts: of batches of this kind.
            tasks: what the tasks are, for all batches with the same.
            roles: returns how their parts act, by path of the module.
        """
        if _is_fake(given):
            return None
        key = (_signature(given, 1, bool(model.__dict__["training"]))[1], tasks)
        with suppress(KeyError):
            return self._shared[key]
        return _keep(self._shared, key, find_shared(model, given, facts, roles()))

    def forget(self, given: tuple[Any, Any], samples: int, training: bool, facts: RowFacts) -> None:
        """Record that a batch did not match its facts; from now on its kind runs one task at a time."""
        pattern, exact = _signature(given, samples, training)
        self._general.pop(pattern, None)
        for size in (pattern, exact):
            self._sized.pop((size, samples), None)
        _keep(self._exact, exact, RowFacts(facts.cut, facts.outputs, {}, "a path that depends on the data", True))


def _keep(known: dict[Any, _Known], key: Any, value: _Known) -> _Known:
    """Keep a value, and forget all others if there are too many, as of a number that each call passes anew."""
    if len(known) >= _MOST and key not in known:
        known.clear()
    known[key] = value
    return value


def _is_fake(given: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for _, leaf in leaves(given))


def _signature(given: Any, samples: int, training: bool) -> tuple[Any, Any]:
    """Return the signature of a batch without its sizes, and the signature with them."""
    pattern: list[Any] = [training]
    sizes: list[Any] = []
    for key, leaf in leaves(given):
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            lie = tuple(size == samples for size in shape)
            pattern.append((key, leaf.dtype, lie, tuple(size == 1 for size in shape)))
            sizes.append(tuple(None if size == samples else size for size in shape))
        elif is_cache(leaf):
            length = _length(leaf)
            pattern.append((key, type(leaf), length > 0))
            sizes.append(length)
        else:
            pattern.append((key, type(leaf)))
            sizes.append(leaf if isinstance(leaf, bool | int | float | str) else None)
    return tuple(pattern), (tuple(pattern), tuple(sizes), samples == 1)


def _length(cache: Any) -> int:
    """Number of tokens in a cache of keys and values; a cache of states, as Mamba's, counts none."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())
