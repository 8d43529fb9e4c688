"""Splits labelled samples in two, class by class; gives labels the numbers that another list of classes has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from visadapt.errors import VisadaptError, nearest

Set = TypeVar("Set", bound=Any)


def stratified(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Chooses ``n`` samples with the class shares of the whole, by a seed.

    Args:
        labels: class indices, int64, ``(N,)``.
        n: how many to choose, between 1 and ``N - 1``.
        seed: the same seed chooses the same samples.

    Returns:
        The indices left and the indices chosen, each in ascending order.

    Raises:
        VisadaptError: ``n`` is out of range.
    """
    total = len(labels)
    if not 0 < n < total:
        raise VisadaptError(f"cannot hold out {n} of {total} samples: choose between 1 and {total - 1}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator)
    counts = torch.bincount(labels)
    # in integers, so that a tie is a tie: whole parts first, what is left to the classes with the largest remainders
    share, remainder = counts * n // total, counts * n % total
    share[torch.argsort(remainder, descending=True, stable=True)[: n - int(share.sum())]] += 1
    chosen = torch.cat([shuffled[labels[shuffled] == c][: int(k)] for c, k in enumerate(share)])
    left = torch.ones(total, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten(), chosen.sort().values


def renumbered(data: Set, labels: Sequence[str]) -> Set:
    """A data set whose classes are numbered as a task's labels: a folder that lacks one numbers the others differently.

    Args:
        data: an ``ImageSet`` or a ``TextSet``.
        labels: the names of the task's labels.

    Raises:
        VisadaptError: a class of the data is none of the labels; the nearest is named.
    """
    for name in data.classes:
        if name not in labels:
            raise VisadaptError(f"{data.name} has a class {name!r}, which the task has not{nearest(name, labels)}")
    numbers = torch.tensor([list(labels).index(name) for name in data.classes])
    splits = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    moved = {
        name: dataclasses.replace(split, labels=numbers[split.labels])
        for name, split in splits.items()
        if name in ("train", "validation", "test")
    }
    return dataclasses.replace(data, classes=tuple(labels), **moved)
