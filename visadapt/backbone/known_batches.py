"""Row facts of every kind of batch that a model has run, each found once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from visadapt.backbone.batch import Axis, Key, is_cache, leaves
from visadapt.backbone.entry import WHOLE, Entry
from visadapt.backbone.examine import examine
from visadapt.backbone.rows import HostRows, RowFacts, both_hosts, shape_of
from visadapt.backbone.shared_pass import SharedPass, find_shared
from visadapt.backbone.size_rules import SizeRules, find_rules
from visadapt.backbone.state import Label
from visadapt.errors import VisadaptError

_TRIES = 3
"""How many batches of a kind are examined until one holds two samples whose outputs differ."""

_EXACT = 32
"""How many signatures of one pattern are examined as they are."""

_RULES = 8
"""How many sets of conditions on sizes are found for one pattern."""

_FEW = 3
"""How many samples show whether the facts of other sizes are the same."""

_Known = TypeVar("_Known")

_MOST = 1024
"""How many facts of one sort are kept."""


@dataclass
class _Pattern:
    """What the examined batches of one pattern have in common.

    Attributes:
        facts: of the first.
        form: what is equal in the facts of all; None if they differ.
        examined: number of signatures that were examined.
        numbers: the numbers of samples at which they were examined.
        sizes: their other sizes.
        largest: elements of the largest that was examined with all its samples.
        rules: conditions on sizes, each with the facts of the batches that satisfy them.
        ruled: whether such conditions can be found.
    """

    facts: RowFacts
    form: Any
    examined: int = 0
    numbers: set[int] = field(default_factory=set)
    sizes: set[Any] = field(default_factory=set)
    largest: int = 0
    rules: list[tuple[SizeRules, RowFacts]] = field(default_factory=list)
    ruled: bool = True

    def covers(self, signature: _Signature) -> bool:
        """Return whether a batch needs no examination of its own."""
        if self.form is not None and self.facts.reordered:
            # runs one task at a time, which is right for every size
            return self.examined > 1
        return self.lacks_sizes_only(signature) and signature.sizes in self.sizes

    def ruled_facts(self, given: Any) -> RowFacts | None:
        """Return the facts of batches for which the model tests sizes with the same results, if any were examined."""
        return next((facts for rules, facts in self.rules if rules.hold(given)), None)

    def find_rules(self, model: nn.Module, given: Any, facts: RowFacts, entry: Entry) -> None:
        """Find the sizes for which the facts of a batch hold; not for the first batch, which may be the only one."""
        if self.examined > 1 and self.ruled and not facts.reordered:
            rules = find_rules(model, given, facts.cut, entry)
            if rules is not None and rules.hold(given):
                self.rules.append((rules, facts))
            self.ruled = rules is not None and len(self.rules) < _RULES

    def lacks_sizes_only(self, signature: _Signature) -> bool:
        """Return whether as many samples, and a batch as large, have been examined."""
        known = self.form is not None and signature.samples in self.numbers
        return self.examined >= _EXACT and known and signature.elements <= self.largest

    def distrust(self) -> None:
        """Use no facts for other batches than those they were found for."""
        self.form, self.rules, self.ruled = None, [], False

    def add(self, signature: _Signature, found: RowFacts, few: bool) -> None:
        """Add a batch that was examined, with all its samples or with few of them."""
        self.examined += 1
        self.form = self.form if self.form == _form(found) else None
        _add(self.sizes, signature.sizes)
        if not few:
            _add(self.numbers, signature.samples)
            self.largest = max(self.largest, signature.elements)


class KnownBatches:
    """Row facts of one entry, by signature of the batch: structure, dtypes and all sizes.

    A model may treat batches of any size in a way of their own. Facts are therefore used for those sizes for which the
    model's tests of sizes have the same results (see `visadapt.backbone.size_rules`). Where these tests cannot be
    found, every signature is examined. From the 33rd signature of one structure on, if all have the same facts, a batch
    is then examined for what is new in it only: its number of samples, its other sizes (on three samples), or its size
    as a whole if it is the largest so far. At most as many examinations follow as there are numbers of samples and
    sizes, not as many as there are pairs of these.

    Args:
        entry: the method that is called with the batches.

    Attributes:
        entry: that method.
        hosts: facts that hold for all batches so far, by path of the module.
        moving: attributes that each forward sets to what follows from its input.
    """

    def __init__(self, entry: Entry = WHOLE) -> None:
        self.entry = entry
        self.hosts: dict[str, HostRows] = {}
        self.moving: frozenset[Label] = frozenset()
        self._exact: dict[Any, RowFacts] = {}
        self._patterns: dict[Any, _Pattern] = {}
        self._kinds: dict[Any, RowFacts] = {}
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
        signature = _Signature.of(given, samples, bool(model.__dict__["training"]))
        found, pattern = self._exact.get(signature.exact), self._patterns.get(signature.pattern)
        if found is None and pattern is not None and (not several or _is_fake(given) or pattern.covers(signature)):
            found = pattern.facts
        if found is None and pattern is not None:
            found = pattern.ruled_facts(given)
            if found is not None:
                _keep(self._exact, signature.exact, found)
        if found is not None and (found.evidence or not several or self._tries.get(signature.exact, 0) >= _TRIES):
            return found
        kind = (signature.pattern[0], *(key for key, _ in leaves(given)))
        if _is_fake(given) and kind in self._kinds:
            # fake tensors have no values to compare
            return self._kinds[kind]
        if pattern is not None and pattern.lacks_sizes_only(signature):
            found = examine(model, given, samples, classes, self.entry, _FEW)
            if found.evidence and _form(found) == pattern.form:
                pattern.add(signature, found, few=True)
                return pattern.facts
        found = examine(model, given, samples, classes, self.entry)
        self.moving |= found.moving
        _keep(self._tries, signature.exact, self._tries.get(signature.exact, 0) + 1)
        _keep(self._exact, signature.exact, found)
        if found.evidence:
            pattern = pattern or _keep(self._patterns, signature.pattern, _Pattern(found, _form(found)))
            pattern.add(signature, found, few=False)
            pattern.find_rules(model, given, found, self.entry)
        if found.evidence and not found.reordered:
            self._kinds[kind] = found
            for path, host in found.hosts.items():
                self.hosts[path] = both_hosts(self.hosts[path], host) if path in self.hosts else host
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
        kind = _Signature.of(given, samples, bool(model.__dict__["training"])).exact
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
        key = (_Signature.of(given, 1, bool(model.__dict__["training"])).exact, tasks)
        with suppress(KeyError):
            return self._shared[key]
        return _keep(self._shared, key, find_shared(model, given, facts, roles()))

    def forget(self, given: tuple[Any, Any], samples: int, training: bool, facts: RowFacts) -> None:
        """Record that a batch did not match its facts; from now on its kind runs one task at a time."""
        signature = _Signature.of(given, samples, training)
        if signature.pattern in self._patterns:
            # what one batch showed does not hold for others
            self._patterns[signature.pattern].distrust()
        other = RowFacts(facts.cut, facts.outputs, {}, "a path that depends on the data", True)
        _keep(self._exact, signature.exact, other)


def _keep(known: dict[Any, _Known], key: Any, value: _Known) -> _Known:
    """Keep a value, and forget all others if there are too many, as of a number that each call passes anew."""
    if len(known) >= _MOST and key not in known:
        known.clear()
    known[key] = value
    return value


def _is_fake(given: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for _, leaf in leaves(given))


@dataclass(frozen=True)
class _Signature:
    """Signature of a batch.

    Attributes:
        pattern: structure and dtypes, and which axes have N or 1 elements.
        sizes: of the other axes; values of numbers and texts.
        samples: N.
        elements: of all tensors together.
    """

    pattern: tuple[Any, ...]
    sizes: tuple[Any, ...]
    samples: int
    elements: int

    @property
    def exact(self) -> Any:
        """What is equal for batches that are treated alike."""
        return self.pattern, self.sizes, self.samples

    @staticmethod
    def of(given: Any, samples: int, training: bool) -> _Signature:
        """Return the signature of a batch."""
        pattern: list[Any] = [training]
        sizes: list[Any] = []
        elements, steps = 0, False
        for key, leaf in leaves(given):
            if isinstance(leaf, Tensor):
                shape = tuple(leaf.shape)
                pattern.append((key, leaf.dtype, tuple(n == samples for n in shape), tuple(n == 1 for n in shape)))
                sizes.append(tuple(None if n == samples else n for n in shape))
                elements += leaf.numel()
            elif is_cache(leaf):
                length = _length(leaf)
                pattern.append((key, type(leaf), length > 0))
                sizes.append(length)
                steps = steps or length > 0
            else:
                pattern.append((key, type(leaf)))
                sizes.append(leaf if isinstance(leaf, bool | int | float | str) else None)
        if steps:
            # each step of a generation is longer by one
            sizes = [_doubled(size) for size in sizes]
        return _Signature(tuple(pattern), tuple(sizes), samples, elements)


def _doubled(size: Any) -> Any:
    """Return the same for sizes of which none is twice the other."""
    if isinstance(size, tuple):
        return tuple(map(_doubled, size))
    return size.bit_length() if type(size) is int else size


def _form(facts: RowFacts) -> Any:
    """Return what must be equal in the facts of two batches if they are to hold for others too."""
    return (facts.cut, facts.outputs) if facts.reordered else shape_of(facts)


def _add(known: set[Any], value: Any) -> None:
    """Add a value, and forget all others if there are too many."""
    if len(known) >= _MOST and value not in known:
        known.clear()
    known.add(value)


def _length(cache: Any) -> int:
    """Number of tokens in a cache of keys and values; a cache of states, as Mamba's, counts none."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())
