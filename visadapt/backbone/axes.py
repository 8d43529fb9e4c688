"""Axes as products of factors, some of which count channels; a reshape regroups them, a broadcast compares them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Factor(NamedTuple):
    """A factor of an axis: its size, and whether it counts channels. A reshape regroups factors."""

    size: int
    channel: bool


Axis: TypeAlias = tuple[Factor, ...]
"""The factors of one axis, outermost first; none for an axis of size 1."""

Axes: TypeAlias = tuple[Axis, ...]
"""The axes of one tensor."""


def channel_axis(axes: Axes | None) -> int | None:
    """The one axis that holds the channels, or None if it is not established.

    In a 2-D tensor whose last axis holds all features of a sample, channels and positions, it is that axis.
    """
    if axes is None:
        return None
    found = sorted(claims(axes))
    if len(found) != 1:
        return None
    whole = all(factor.channel for factor in axes[found[0]])
    return found[0] if whole or (len(axes) == 2 and found == [1]) else None


def axis_of_size(size: int, channel: bool) -> Axis:
    return (Factor(size, channel),) if channel or size != 1 else ()


def plain(shape: Sequence[int]) -> Axes:
    return tuple(axis_of_size(int(size), False) for size in shape)


def cleared(axes: Axes) -> Axes:
    return tuple(tuple(Factor(factor.size, False) for factor in axis) for axis in axes)


def established(source: Axes | None, shape: Sequence[int], at: int) -> Axes:
    """Axes of which one alone holds the channels."""
    if source is None or len(source) != len(shape):
        source = plain(shape)
    axes = [*cleared(resize(source, shape))]
    axes[at] = axis_of_size(shape[at], True)
    return tuple(axes)


def resize(axes: Axes, shape: Sequence[int]) -> Axes:
    """Set new sizes; an axis whose size changes becomes a single factor."""
    return tuple(
        axis if axis_size(axis) == size else axis_of_size(size, bool(axis) and all(factor.channel for factor in axis))
        for axis, size in zip(axes, shape, strict=True)
    )


def agreed(inputs: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Combine the axes of inputs that are broadcast against each other; no channels if they contradict each other."""
    best: Axes = ((),) * len(shape)
    for given in inputs:
        if len(given) > len(shape):
            return plain(shape)
        axes = (*((),) * (len(shape) - len(given)), *given)
        if not claims(best):
            best = axes if claims(axes) or size_of(axes) > size_of(best) else best
            continue
        if not claims(axes):
            continue
        # a broadcast axis carries no information
        whole = [i for i, size in enumerate(shape) if axis_size(axes[i]) == axis_size(best[i]) == size]
        more, fewer = claims(axes), claims(best)
        if (more ^ fewer) & set(whole):
            return plain(shape)
        if not (more <= fewer or fewer <= more):
            return plain(shape)
        best = axes if (len(more), size_of(axes)) > (len(fewer), size_of(best)) else best
    return resize(best, shape)


def claims(axes: Axes) -> set[int]:
    """The axes that count channels, in whole or in part."""
    return {i for i, axis in enumerate(axes) if any(factor.channel for factor in axis)}


def axis_size(axis: Axis) -> int:
    """The size of one axis."""
    return math.prod(factor.size for factor in axis)


def size_of(axes: Axes) -> int:
    """Number of elements."""
    return math.prod(axis_size(axis) for axis in axes)


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The factors of a reshaped tensor, in their order; None if the new axes cut through them."""
    waiting = [factor for axis in reversed(axes) for factor in reversed(axis) if factor != (1, False)]
    result: list[Axis] = []
    for size in shape:
        axis: list[Factor] = []
        missing = size
        if size == 1 and waiting and waiting[-1].size == 1:
            axis.append(waiting.pop())
        while missing > 1 and waiting:
            factor = waiting.pop()
            if factor.size == 1:
                continue
            if missing % factor.size and factor.size % missing:
                return None
            if factor.size > missing:
                waiting.append(Factor(factor.size // missing, factor.channel))
                factor = Factor(missing, factor.channel)
            axis.append(factor)
            missing //= factor.size
        result.append(tuple(axis))
    return tuple(result)
