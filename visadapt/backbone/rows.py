"""Which rows of every module's tensors belong to which sample, found by two small forwards.

A copy of the backbone runs on two samples of the batch, (p, q), and then on as many as the batch has, each of them p
or q: (q, q, p) for three. The batch axis of a tensor is the axis that grows from 2k to Nk. Its order is the one in
which the rows for N samples repeat those for (p, q). Where a module mixes samples, or orders them by their data or by
their number, no order fits and the rows are marked as unknown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from visadapt.backbone.batch import Axis, Key

FREE = "free"
"""Fact of a tensor that does not depend on the batch."""

UNKNOWN = "unknown"
"""Fact of a tensor for which it is not known which rows belong to which sample."""


@dataclass(frozen=True)
class Lying:
    """Position of a batch's samples in a tensor.

    Attributes:
        axis: the batch axis, or ``ITEMS`` for a list with one element per sample.
        repeat: rows per sample.
        tiled: True if row r belongs to sample r mod N (two views concatenated), False if it belongs to sample
            r // repeat (windows), None if both are the same.
    """

    axis: Axis
    repeat: int = 1
    tiled: bool | None = None


Fact = Lying | str
"""``FREE``, ``UNKNOWN`` or the position of the samples."""


@dataclass(frozen=True)
class HostRows:
    """The rows of one module's tensors, over all its calls.

    Attributes:
        inputs: fact by path in ``(args, kwargs)``.
        outputs: fact by path in the output.
        writes: whether the module writes to its inputs, so that a copy of some rows cannot stand for them, or keeps
            tensors for its next call, which would be of other rows.
        known: True if each row belongs to one known sample: along the first axis, in the same order everywhere.
        order: ``tiled`` of its tensors; None if every sample has one row.
    """

    inputs: dict[Key, Fact]
    outputs: dict[Key, Fact]
    writes: bool = False
    # computed in __post_init__: a cached_property takes a lock, which torch.compile cannot trace
    known: bool = field(init=False)
    order: bool | None = field(init=False)

    def __post_init__(self) -> None:
        inputs, outputs = self.inputs.values(), self.outputs.values()
        lying = [fact for fact in (*inputs, *outputs) if isinstance(fact, Lying)]
        orders = [fact.tiled for fact in lying if fact.tiled is not None]
        known = (
            UNKNOWN not in (*inputs, *outputs)
            and all(fact.axis == 0 for fact in lying)
            and len(set(orders)) < 2
            and any(isinstance(fact, Lying) for fact in inputs)
            and any(isinstance(fact, Lying) for fact in outputs)
        )
        object.__setattr__(self, "known", known)
        object.__setattr__(self, "order", orders[0] if orders else None)


@dataclass
class RowFacts:
    """Row facts of one kind of batch.

    Attributes:
        cut: batch axis of each tensor of the model's input, by path.
        outputs: position of the samples in the model's output, by path.
        hosts: facts of the modules that were called, by path.
        reordered: name of the operator that may order rows by their data, or "".
        evidence: whether the outputs of the two compared samples differ; if they are equal, the comparison shows
            nothing.
        moving: attributes that each forward sets to what follows from its input.
        kept: attribute in which a forward keeps a tensor for the next one, or "".
    """

    cut: dict[Key, Axis]
    outputs: dict[Key, Fact]
    hosts: dict[str, HostRows]
    reordered: str
    evidence: bool
    moving: frozenset[tuple[str, str]] = frozenset()
    kept: str = ""

    def knows(self, path: str) -> bool:
        """Return whether the rows at a module are known."""
        host = self.hosts.get(path)
        return host is not None and self.evidence and not self.reordered and host.known


@dataclass
class Print:
    """Fingerprint of a tensor: its shape, and two fixed projections of each row."""

    shape: tuple[int, ...]
    rows: Tensor
    tolerance: float

    @staticmethod
    def of(tensor: Tensor, most: int = 0) -> Print:
        """Compute the fingerprint of a tensor along its first axis.

        Args:
            tensor: any tensor.
            most: about how many numbers of each row are enough; 0 for all of them.
        """
        shape = tuple(tensor.shape)
        if not tensor.numel():
            return Print(shape, torch.zeros(shape[0], 2, dtype=torch.double), 0.0)
        wide = tensor.detach().reshape(shape[0], -1) if tensor.ndim else tensor.detach().reshape(1, 1)
        if most and wide.shape[1] > 2 * most:
            # odd, so that not all are of the same column of an image
            wide = wide[:, :: wide.shape[1] // most | 1]
        wide = torch.view_as_real(wide).flatten(1) if wide.is_complex() else wide
        wide = torch.nan_to_num(wide.double(), nan=3.0, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)
        size = wide.shape[1]
        weights = _shared_weights(wide.device)[:size] if size <= _SHARED else _weights(size, wide.device)
        exact = not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.float64)
        return Print(shape, (wide @ weights).cpu(), 5e-5 if exact else 5e-2)


_SHARED = 16384
"""Length of the rows up to which all tensors are projected with the same numbers, computed once per device."""


def _weights(size: int, device: torch.device) -> Tensor:
    angles = torch.arange(1, size + 1, dtype=torch.double, device=device)[:, None]
    return torch.sin(angles * angles.new_tensor([[12.9898, 78.233]]))


@cache
def _shared_weights(device: torch.device) -> Tensor:
    # not a fake tensor, nor one of inference mode, which later forwards could not use
    with _disable_current_modes(), torch.inference_mode(False):
        return _weights(_SHARED, device)


@cache
def order_of(samples: int) -> tuple[int, ...]:
    """Return which of two samples, 0 or 1, stands in each place of a batch of N.

    Two thirds are 1, so that a mean over samples differs from that of one of each. The places are drawn at random, but
    the same each time, so that no reversal, shift or interleaving of the batch gives the same order.

    Args:
        samples: N; at least three are returned, as the batch axis is the one that grows.
    """
    if samples < 5:
        return (1, 0, 1, 1) if samples == 4 else (1, 1, 0)
    ones = round(samples * 2 / 3) - 2
    drawn = random.Random(1000 * samples + 1)
    return 1, 0, *drawn.sample([1] * ones + [0] * (samples - 4 - ones), samples - 4), 1, 0


def fact_of(two: Tensor | Print, many: Tensor | Print, axis: int = 0, order: Sequence[int] = order_of(3)) -> Fact:
    """Find the position of the samples in a tensor, given its values for the samples (p, q) and for N of these.

    Args:
        two: the tensor, or its print, for two samples.
        many: the same for N samples.
        axis: the axis along which the prints were taken; of tensors, every axis is examined.
        order: which of the two each of the N samples is; see `order_of`.

    Returns:
        the position, ``FREE`` or ``UNKNOWN``.
    """
    grown = [i for i, (p, q) in enumerate(zip(two.shape, many.shape, strict=False)) if p != q]
    if len(two.shape) != len(many.shape) or len(grown) > 1:
        return UNKNOWN
    if isinstance(two, Tensor) and isinstance(many, Tensor):
        at = grown[0] if grown else 0
        moved = [tensor.movedim(at, 0) if tensor.ndim else tensor for tensor in (two, many)]
        found = fact_of(Print.of(moved[0]), Print.of(moved[1]), order=order)
        return Lying(at, found.repeat, found.tiled) if isinstance(found, Lying) else found
    assert isinstance(two, Print)
    assert isinstance(many, Print)
    scale = float(many.rows.abs().max()) if many.rows.numel() else 0.0
    if not grown:
        apart = float((two.rows - many.rows).abs().max()) if many.rows.numel() else 0.0
        return FREE if apart <= two.tolerance * scale else UNKNOWN
    size, more = two.shape[grown[0]], many.shape[grown[0]]
    if grown != [axis] or size % 2 or size * len(order) != more * 2:
        # rows of one sample only, where a batch is run in parts
        return UNKNOWN
    repeat = size // 2
    index = list(order)
    block = two.rows.view(2, repeat, -1)[index].reshape(more, -1)
    tile = two.rows.view(repeat, 2, -1)[:, index].reshape(more, -1)
    as_block, as_tile = (float((rows - many.rows).abs().max()) for rows in (block, tile))
    if min(as_block, as_tile) > two.tolerance * scale:
        return UNKNOWN
    if repeat == 1:
        return Lying(axis)
    if max(as_block, as_tile) <= max(4 * min(as_block, as_tile), 1e-9 * scale):
        return UNKNOWN if scale else Lying(axis, repeat)
    return Lying(axis, repeat, as_tile < as_block)


def merged(calls: Any, order: Sequence[int], writes: bool = False) -> HostRows:
    """Merge the facts of all calls of one module.

    Args:
        calls: per call the prints of inputs and outputs for two samples, and those for N.
        order: which of the two each of the N samples is.
        writes: whether the module writes to its inputs in any of them, or keeps tensors from one to the next.
    """
    found: tuple[dict[Key, Fact], dict[Key, Fact]] = {}, {}
    for fewer, more in calls:
        for kept, few, many in zip(found, fewer, more, strict=True):
            for key in few.keys() | many.keys():
                fact = fact_of(few[key], many[key], order=order) if key in few and key in many else UNKNOWN
                kept[key] = fact if kept.setdefault(key, fact) == fact else _both(kept[key], fact)
    return HostRows(*found, writes)


def _both(one: Fact, other: Fact) -> Fact:
    """Return the fact that holds for both calls."""
    if not isinstance(one, Lying) or not isinstance(other, Lying) or one.axis != other.axis:
        return UNKNOWN
    orders = {one.tiled, other.tiled} - {None}
    return UNKNOWN if len(orders) > 1 else Lying(one.axis, max(one.repeat, other.repeat), next(iter(orders), None))


def both_hosts(one: HostRows, other: HostRows) -> HostRows:
    """Merge the facts of one module for two kinds of batch."""

    def each(left: dict[Key, Fact], right: dict[Key, Fact]) -> dict[Key, Fact]:
        found = {**right, **left}
        for key in left.keys() & right.keys():
            found[key] = left[key] if left[key] == right[key] else _both(left[key], right[key])
        return found

    return HostRows(each(one.inputs, other.inputs), each(one.outputs, other.outputs), one.writes or other.writes)


def shape_of(facts: RowFacts) -> Any:
    """Return what must be equal for two batch sizes if their facts are to hold for every size."""

    def each(found: dict[Key, Fact]) -> Any:
        return {k: (f.axis, f.repeat > 1, f.tiled) if isinstance(f, Lying) else f for k, f in found.items()}

    hosts = {path: (each(host.inputs), each(host.outputs)) for path, host in facts.hosts.items()}
    return facts.cut, each(facts.outputs), hosts
