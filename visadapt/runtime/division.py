"""A batch divided among tasks: each group's share of a tensor, and the groups' outputs put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.batch import ITEMS, Axis, Key, children, is_cache, is_opaque, mapped, rebuilt
from visadapt.backbone.rows import FREE, Fact, Lying
from visadapt.errors import VisadaptError
from visadapt.methods.stacking import Rows, rows_for


class UnfitError(VisadaptError):
    """A batch was not as its facts say, or cannot be divided where it would have to be."""


class Division:
    """Which group each sample of a batch belongs to.

    Args:
        number: the number of the group, per sample.
        place: where the batch is divided, for messages.
    """

    def __init__(self, number: tuple[int, ...], place: str) -> None:
        self.number = number
        self.place = place
        self.samples = [[i for i, n in enumerate(number) if n == g] for g in range(max(number) + 1)]

    def rows(self, size: int, device: torch.device, fact: Fact | None) -> Rows:
        """Which of so many rows belong to which group.

        Args:
            size: number of rows.
            device: of their tensor.
            fact: how the samples lie among them.

        Raises:
            UnfitError: these are not the rows of these samples.
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
        """One group's share of a batch.

        Args:
            tree: the batch.
            facts: how the samples lie in its tensors, by path; FREE where they are every group's.
            group: number of the group.

        Raises:
            UnfitError: something cannot be divided.
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
        """Put the groups' outputs together; logits narrower than the widest are padded with −inf.

        Args:
            outs: of each group, in the order of their numbers.
            facts: how the samples lie in the whole, by path.
            key: path of ``outs``.

        Raises:
            UnfitError: something cannot be put together.
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
            # one that was not asked for: a call with one, or with use_cache=True, is refused before it begins
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
        # what looks free of the batch may not be free of the tasks
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
    """Logits of several widths as wide as the widest, filled with −inf along the one axis in which they differ.

    Raises:
        UnfitError: they differ in more than one axis, or are not floats.
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
