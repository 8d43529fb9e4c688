"""Split a batch by task and join the outputs of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import ITEMS, Axis, Key, children, is_cache, is_opaque, mapped, rebuilt
from visadapt.backbone.rows import FREE, Fact, Lying
from visadapt.errors import VisadaptError
from visadapt.methods.stacking import Rows, rows_for


class UnfitError(VisadaptError):
    """A batch does not match its facts, or cannot be split at some module."""


def grouped(keys: Sequence[Any]) -> tuple[list[Any], tuple[int, ...], list[list[int]]]:
    """Return the distinct keys in order, the index of each position's key, and the positions of each key."""
    numbers: dict[Any, int] = {}
    number = tuple([numbers.setdefault(key, len(numbers)) for key in keys])
    positions: list[list[int]] = [[] for _ in numbers]
    for position, n in enumerate(number):
        positions[n].append(position)
    return list(numbers), number, positions


class Division:
    """Assignment of the samples of a batch to groups.

    Args:
        number: index of the group, per sample.
        place: the module at which the batch is split, for messages.
        samples: the samples of each group, if already computed.
    """

    def __init__(self, number: tuple[int, ...], place: str, samples: Sequence[Sequence[int]] | None = None) -> None:
        self.number = number
        self.place = place
        self.samples = grouped(number)[2] if samples is None else samples

    def rows(self, size: int, device: torch.device, fact: Fact | None) -> Rows:
        """Return which rows of a tensor belong to which group.

        Args:
            size: number of rows.
            device: device of the tensor.
            fact: position of the samples in the tensor.

        Raises:
            UnfitError: the number of rows does not fit the samples, or their position is not known.
        """
        if not isinstance(fact, Lying):
            raise UnfitError(f"it is not known which rows belong to which sample at {self.place}")
        repeat, rest = divmod(size, len(self.number))
        if rest or not repeat or (repeat > 1 and fact.tiled is None):
            raise UnfitError(
                f"{self.place} was called with {size} rows for {len(self.number)} tasks: name one task per sample"
            )
        if fact.tiled and repeat > 1:
            return rows_for(self.number * repeat, 1, device)
        return rows_for(self.number, repeat, device)

    def share(self, tree: Any, facts: Mapping[Key, Fact | Axis], group: int) -> Any:
        """Return one group's part of a batch.

        Args:
            tree: the batch.
            facts: position of the samples in its tensors, by path; tensors marked ``FREE`` go to every group whole.
            group: index of the group.

        Raises:
            UnfitError: a part of the batch cannot be split.
        """

        def pick(key: Key, leaf: Any) -> Any:
            fact = facts.get(key)
            axis = fact.axis if isinstance(fact, Lying) else fact
            if axis == ITEMS:
                return rebuilt(leaf, [leaf[i] for i in self.samples[group]])
            if is_opaque(leaf):
                raise UnfitError(f"{self.place} was called with a {type(leaf).__name__}, which tasks cannot share")
            if not isinstance(leaf, Tensor) or axis == FREE:
                return leaf
            if not isinstance(axis, int):
                raise UnfitError(f"it is not known which rows belong to which sample at {self.place}")
            rows = self.rows(leaf.shape[axis], leaf.device, fact if isinstance(fact, Lying) else Lying(axis))
            return rows.take(leaf, group) if axis == 0 else rows.take(leaf.movedim(axis, 0), group).movedim(0, axis)

        return mapped(pick, tree, lambda key, _: _axis(facts.get(key)) == ITEMS)

    def join(self, outs: list[Any], facts: Mapping[Key, Fact], key: Key = ()) -> Any:
        """Join the outputs of the groups; narrower logits are padded with −inf to the width of the widest.

        Args:
            outs: the outputs, one per group, in the order of their indices.
            facts: position of the samples in the joined output, by path.
            key: path of ``outs`` in the whole output.

        Raises:
            UnfitError: the outputs cannot be joined.
        """
        first, fact = outs[0], facts.get(key)
        if isinstance(first, Tensor):
            return self._tensors(outs, fact, key)
        if _axis(fact) == ITEMS:
            items: list[Any] = [None] * len(self.number)
            for samples, out in zip(self.samples, outs, strict=True):
                for i, item in zip(samples, out, strict=True):
                    items[i] = item
            return rebuilt(first, items)
        inner = children(first)
        if inner is not None:
            if any(type(out) is not type(first) or len(children(out) or ()) != len(inner) for out in outs):
                raise UnfitError(f"the tasks' outputs at {self.place} differ in structure")
            each = zip(*[[value for _, value in children(out) or ()] for out in outs], strict=True)
            joined = [
                self.join(list(values), facts, (*key, step)) for (step, _), values in zip(inner, each, strict=True)
            ]
            return rebuilt(first, joined)
        if is_cache(first):
            # the caller did not ask for a cache: calls with one, or with use_cache=True, are refused beforehand
            return None
        if is_opaque(first):
            raise UnfitError(
                f"{self.place} gave a {type(first).__name__}, which cannot be put together from several tasks'"
            )
        return first

    def _tensors(self, outs: list[Tensor], fact: Fact | None, key: Key) -> Tensor:
        if isinstance(fact, Lying) and isinstance(fact.axis, int):
            axis = fact.axis
            outs = padded(outs, axis, self.place)
            moved = outs if axis == 0 else [out.movedim(axis, 0) for out in outs]
            size = sum(out.shape[0] for out in moved)
            rows = self.rows(size, moved[0].device, fact)
            joined = rows.join(moved)
            return joined if axis == 0 else joined.movedim(0, axis)
        # a tensor that does not depend on the batch may still depend on the task
        differ = any(out.shape != outs[0].shape or not torch.equal(out, outs[0]) for out in outs[1:])
        if fact == FREE and not differ:
            return outs[0]
        what = "a scalar over the whole batch (a loss)" if outs[0].ndim == 0 else "a tensor without samples"
        name = ".".join(map(str, key)) or "its output"
        raise UnfitError(
            f"{name} is {what}, which cannot be put together from several tasks': leave the labels out and compute it "
            "from the logits (visadapt.split)"
        )


def padded(outs: list[Tensor], axis: int, place: str) -> list[Tensor]:
    """Pad logits with −inf to the width of the widest, along the one axis in which their shapes differ.

    Raises:
        UnfitError: the shapes differ in more than one axis, or the outputs are not floats.
    """
    shapes = [[size for i, size in enumerate(out.shape) if i != axis] for out in outs]
    if all(shape == shapes[0] for shape in shapes):
        return outs
    differing = [i for i, sizes in enumerate(zip(*shapes, strict=False)) if len(set(sizes)) > 1]
    if len({len(shape) for shape in shapes}) > 1 or len(differing) != 1 or not outs[0].is_floating_point():
        raise UnfitError(
            f"the tasks' outputs at {place} differ in shape: {', '.join(str(tuple(o.shape)) for o in outs)}"
        )
    at = differing[0] + (differing[0] >= axis)
    widest = max(out.shape[at] for out in outs)
    after = outs[0].ndim - 1 - at
    return [nn.functional.pad(out, (0, 0) * after + (0, widest - out.shape[at]), value=-torch.inf) for out in outs]


def _axis(fact: Any) -> Any:
    return fact.axis if isinstance(fact, Lying) else fact
