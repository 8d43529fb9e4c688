"""Stratified splits of labelled samples, and renumbering of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from visadapt.arguments import takes
from visadapt.errors import VisadaptError, nearest
from visadapt.printable import shown

Set = TypeVar("Set", bound=Any)


@dataclass(frozen=True)
class Splits:
    """A data set prepared for a backbone.

    Args:
        classes: names of the labels; empty for real values.
        train: training samples; None if the data was not split.
        validation: validation samples; None if the data was not split.
        test: test samples.
        inputs: prepare batches, and read single samples.
        remarks: what was decided while loading, for the user to know.
        problem_type: what the labels are, as transformers names it.
    """

    classes: tuple[str, ...]
    train: Any
    validation: Any
    test: Any
    inputs: Any
    remarks: tuple[str, ...] = ()
    problem_type: str = "single_label_classification"


def stratified(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``n`` samples at random, with the class proportions of the whole.

    Each class keeps a sample that is not chosen, as long as there are enough samples of other classes to choose.

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
    most = counts - 1 if n <= total - int((counts > 0).sum()) else counts
    share = share.clamp(max=most.clamp(min=0))
    while missing := n - int(share.sum()):
        rank = torch.where(share < most, remainder, -1)
        share[torch.argsort(rank, descending=True, stable=True)[: min(missing, int((rank >= 0).sum()))]] += 1
    chosen = torch.cat([shuffled[labels[shuffled] == c][: int(k)] for c, k in enumerate(share)])
    left = torch.ones(total, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten(), chosen.sort().values


def indices_of(indices: Any, count: int) -> Tensor:
    """Return indices of samples as a tensor.

    Args:
        indices: integers, in any order.
        count: number of samples.

    Returns:
        int64, ``(n,)``.

    Raises:
        VisadaptError: they are not indices from 0 to ``count - 1``.
    """
    try:
        index = torch.as_tensor(indices)
        # an empty list has no integers to tell its type by
        whole = not index.numel() or not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        right = index.ndim == 1 and whole
        index = index.to(torch.int64)
    except Exception:  # of a stranger's class, or what cannot be a tensor
        right = False
    if not right:
        raise VisadaptError(f"indices must be a list or a tensor of integers, got {shown(indices, 80)}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        got = f"{int(index.min())} to {int(index.max())}"
        raise VisadaptError(f"indices must be from 0 to {count - 1}, got {got}")
    return index


def without_samples(classes: Sequence[str], labels: Tensor, what: str) -> tuple[str, ...]:
    """Describe the classes of which a training split has no sample, for the user to know; empty if there are none.

    Args:
        classes: their names.
        labels: of the training samples, in any form.
        what: the samples, for the message.
    """
    if labels.dtype != torch.int64:
        return ()
    missing = [name for name, count in zip(classes, torch.bincount(labels, minlength=len(classes)), strict=True)
               if not count]  # fmt: skip
    few = f"{len(missing)} of {len(classes)} classes, such as {missing[0]!r}" if missing else ""
    return (f"no {what} are left to train {few}: each class needs two or more",) if missing else ()


@takes()
def renumbered(data: Set, labels: Sequence[str]) -> Set:
    """Renumber a data set's classes as a task numbers its labels.

    A folder that lacks a class would number the others differently.

    Args:
        data: an ``ImageSet`` or a ``TextSet``.
        labels: the names of the task's labels.

    Returns:
        The same data set, with the labels' numbers of the task.

    Raises:
        VisadaptError: a class of the data is not one of the labels; the nearest is named.

    Examples:
        >>> from visadapt.data import TextSet, TextSplit, renumbered
        >>> split = TextSplit(["a rose"], torch.tensor([0]))
        >>> roses = TextSet("roses", ("rose",), split, split, split)
        >>> renumbered(roses, ("lily", "rose")).train.labels
        tensor([1])
    """
    whole: Any = data
    if not hasattr(whole, "classes") or not dataclasses.is_dataclass(whole):
        raise VisadaptError(f"data must be an ImageSet or a TextSet, got {type(data).__name__}")
    numbers = numbers_of(data.classes, labels, data.name)
    splits = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    moved = {
        name: dataclasses.replace(split, labels=relabelled(split.labels, numbers, len(labels)))
        for name, split in splits.items()
        if name in ("train", "validation", "test") and split is not None
    }
    return dataclasses.replace(data, classes=tuple(labels), **moved)


def numbers_of(classes: Sequence[str], labels: Sequence[str], where: str) -> Tensor:
    """Return the number that a task gives to each class of a data set.

    Raises:
        VisadaptError: a class is not one of the labels; the nearest is named.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    for name in classes:
        if name not in numbers:
            raise VisadaptError(f"{where} has a class {name!r} that the task does not have{nearest(name, labels)}")
    return torch.tensor([numbers[name] for name in classes], dtype=torch.int64)


def relabelled(values: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Number classes anew; real values stay as they are.

    Args:
        values: class indices ``(N,)``, bool ``(N, C)``, or real values.
        numbers: the new index of each class.
        width: number of classes of the task.
    """
    if values.is_floating_point():
        return values
    if values.ndim == 1:
        return numbers[values]
    hot = torch.zeros(len(values), width, dtype=torch.bool)
    hot[:, numbers] = values
    return hot
