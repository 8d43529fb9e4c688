"""The facts of the kinds of batch that a model has met, each established once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from visadapt.backbone.batch import is_cache, leaves
from visadapt.backbone.entry import WHOLE, Entry
from visadapt.backbone.examine import examine
from visadapt.backbone.rows import HostRows, RowFacts, both_hosts, shape_of

_TRIES = 3
"""How often batches of equal samples are examined again, in the hope of samples that differ."""


class KnownBatches:
    """Row facts of what enters by one method, by signature of the batch.

    A signature is the batch's structure, its dtypes and its sizes beside the number of samples.

    Where batches of two sizes, alike in all else, were found to be alike in their facts, these hold for every size.

    Args:
        entry: the method.

    Attributes:
        hosts: facts that hold for all batches that were met, by path of the module.
    """

    def __init__(self, entry: Entry = WHOLE) -> None:
        self._entry = entry
        self.hosts: dict[str, HostRows] = {}
        self._exact: dict[Any, RowFacts] = {}
        self._general: dict[Any, RowFacts] = {}
        self._first: dict[Any, RowFacts] = {}
        self._kinds: dict[Any, RowFacts] = {}
        self._tries: dict[Any, int] = {}

    def facts(
        self, model: nn.Module, given: tuple[Any, Any], samples: int, several: bool, classes: int | None
    ) -> RowFacts:
        """The facts of a batch; established if its kind is new.

        Args:
            model: the backbone.
            given: ``(args, kwargs)``.
            samples: N, as many as tasks were named.
            several: whether these are several tasks, so that it matters which row is whose.
            classes: width of the backbone's own head.

        Raises:
            VisadaptError: the batch cannot be taken apart into N samples, or the output of one depends on the others.
        """
        pattern, exact = _signature(given, samples, bool(model.__dict__["training"]))
        found = self._exact.get(exact) or self._general.get(pattern)
        if found is not None and (found.evidence or not several or self._tries.get(exact, 0) >= _TRIES):
            return found
        kind = tuple(key for key, _ in leaves(given))
        if any(isinstance(leaf, FakeTensor) for _, leaf in leaves(given)) and kind in self._kinds:
            # of tensors without values nothing can be found out
            return self._kinds[kind]
        found = examine(model, given, samples, classes, self._entry)
        self._tries[exact] = self._tries.get(exact, 0) + 1
        if len(self._exact) >= 1024:
            self._exact.clear()
        self._exact[exact] = found
        if found.evidence and not found.reordered:
            self._kinds[kind] = found
            first = self._first.setdefault(pattern, found)
            if first is not found and shape_of(first) == shape_of(found):
                self._general[pattern] = found
            for path, host in found.hosts.items():
                self.hosts[path] = both_hosts(self.hosts[path], host) if path in self.hosts else host
        return found

    def forget(self, given: tuple[Any, Any], samples: int, training: bool, facts: RowFacts) -> None:
        """Notes that a batch was not as its facts say: from now on its kind runs one task at a time."""
        pattern, exact = _signature(given, samples, training)
        self._exact[exact] = RowFacts(facts.cut, facts.outputs, {}, "a path that depends on the data", True)
        self._general.pop(pattern, None)


def _signature(given: Any, samples: int, training: bool) -> tuple[Any, Any]:
    """What a batch is by its pattern alone, and with its sizes."""
    pattern: list[Any] = [training]
    sizes: list[Any] = []
    for key, leaf in leaves(given):
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            lie = tuple(size == samples for size in shape)
            pattern.append((key, leaf.dtype, lie, tuple(size == 1 for size in shape)))
            sizes.append(tuple(None if size == samples else size for size in shape))
        elif is_cache(leaf):
            length = leaf.get_seq_length()
            pattern.append((key, type(leaf), length > 0))
            sizes.append(length)
        else:
            pattern.append((key, type(leaf)))
            sizes.append(leaf if isinstance(leaf, bool | int | float | str) else None)
    return tuple(pattern), (tuple(pattern), tuple(sizes), samples == 1)
