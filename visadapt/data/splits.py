"""Stratified splits of labelled samples, and renumbering of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from visadapt.errors import VisadaptError, nearest

Set = TypeVar("Set", bound=Any)


def stratified(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``n`` samples at random, with the class proportions of the whole.

    Args:
        labels: class indices, int64, ``(N,)``.
        n: how many to choose, between 1 and ``N - 1``.
        seed: the same seed chooses the same samples.

    Returns:
        The remaining and the chosen indices, each in ascending order.

    Raises:
        VisadaptError: ``n`` is out of range.
    """
    total = len(labels)
    if not 0 < n < total:
        raise VisadaptError(f"the number of samples to hold out must be from 1 to {total - 1}, got {n}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(total, generator=generator)
    counts = torch.bincount(labels)
    # largest remainder method, in integers so that ties are exact
    share, remainder = counts * n // total, counts * n % total
    share[torch.argsort(remainder, descending=True, stable=True)[: n - int(share.sum())]] += 1
    chosen = torch.cat([shuffled[labels[shuffled] == c][: int(k)] for c, k in enumerate(share)])
    left = torch.ones(total, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten(), chosen.sort().values


def renumbered(data: Set, labels: Sequence[str]) -> Set:
    """Renumber a data set's classes as a task numbers its labels.

    A folder that lacks a class would number the others differently.

    Args:
        data: an ``ImageSet`` or a ``TextSet``.
        labels: the names of the task's labels.

    Raises:
        VisadaptError: a class of the data is not one of the labels; the nearest is named.
    """
    for name in data.classes:
        if name not in labels:
            raise VisadaptError(f"{data.name} has a class {name!r} that the task does not have{nearest(name, labels)}")
    numbers = torch.tensor([list(labels).index(name) for name in data.classes])
    splits = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    moved = {
        name: dataclasses.replace(split, labels=numbers[split.labels])
        for name, split in splits.items()
        if name in ("train", "validation", "test")
    }
    return dataclasses.replace(data, classes=tuple(labels), **moved)
