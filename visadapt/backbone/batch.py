"""Batches as a model takes and returns them: tensors in tuples, lists, mappings and dataclasses, by path."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

Key = tuple[Any, ...]
"""Path of a leaf: indices, names of keywords and of fields, from the outside in."""

ITEMS = "items"
"""Stands for the batch axis of a list or tuple that holds one element per sample."""

Axis = int | str
"""The axis of a tensor along which the samples lie, or ``ITEMS``."""

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum, nn.Module, type)


def children(tree: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, with the last step of each element's path; None for a leaf."""
    if isinstance(tree, torch.Size):
        return None
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def with_first(tree: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Replace the first element of a container by ``change(step, element)``; the step is the last one of its path."""
    if type(tree) is tuple:
        return (change(0, tree[0]), *tree[1:])
    (step, first), *rest = cast("list[Any]", children(tree))
    return rebuilt(tree, [change(step, first), *[value for _, value in rest]])


def rebuilt(tree: Any, values: list[Any]) -> Any:
    """Rebuild a container of the same kind with other values."""
    if isinstance(tree, Mapping):
        if type(tree) is dict:
            return dict(zip(tree, values, strict=True))
        new = copy.copy(tree)
        for key, value in zip(list(tree), values, strict=True):
            new[key] = value  # type: ignore[index]
        return new
    if isinstance(tree, tuple | list):
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    new = copy.copy(tree)
    for field, value in zip(dataclasses.fields(tree), values, strict=True):
        object.__setattr__(new, field.name, value)
    return new


def leaves(tree: Any, stop: Callable[[Key, Any], bool] | None = None, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The leaves of a tree with their paths.

    Args:
        tree: nested containers.
        stop: whether a container is to be taken as a leaf.
        key: path of ``tree``.
    """
    inner = None if stop is not None and stop(key, tree) else children(tree)
    if inner is None:
        yield key, tree
        return
    for step, value in inner:
        yield from leaves(value, stop, (*key, step))


def mapped(
    function: Callable[[Key, Any], Any], tree: Any, stop: Callable[[Key, Any], bool] | None = None, key: Key = ()
) -> Any:
    """Replace every leaf of a tree by ``function(path, leaf)``."""
    inner = None if stop is not None and stop(key, tree) else children(tree)
    if inner is None:
        return function(key, tree)
    return rebuilt(tree, [mapped(function, value, stop, (*key, step)) for step, value in inner])


def take(tree: Any, cut: Mapping[Key, Axis], index: Sequence[int]) -> Any:
    """Select samples of a batch, in the order of ``index``.

    Args:
        tree: the batch.
        cut: where the samples lie: the batch axis of a leaf by its path. A leaf that is not named has none.
        index: numbers of samples; one may occur several times.

    Returns:
        A batch of the same structure. Its tensors are copies.
    """

    def pick(key: Key, leaf: Any) -> Any:
        axis = cut.get(key)
        if axis == ITEMS:
            picked = [mapped(lambda _, inner: _copied(inner), leaf[i]) for i in index]
            return rebuilt(leaf, picked) if not hasattr(leaf, "_fields") else picked
        if axis is None:
            return _copied(leaf)
        if isinstance(leaf, Tensor):
            return leaf.index_select(int(axis), torch.tensor(index, device=leaf.device))
        # torch does not copy a tensor that is part of an autograd graph
        held = {id(t): t.detach().clone() for t in _held(leaf)}
        chosen = copy.deepcopy(leaf, held)
        chosen.reorder_cache(torch.tensor(index))
        return chosen

    return mapped(pick, tree, lambda key, _: cut.get(key) == ITEMS)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _held(thing: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in an object's attributes."""
    for value in list((getattr(thing, "__dict__", None) or {}).values()):
        for _, inner in leaves(value):
            if isinstance(inner, Tensor):
                yield inner
            elif depth and not isinstance(inner, (nn.Module, *_PLAIN)) and not callable(inner):
                yield from _held(inner, depth - 1)


def is_cache(leaf: Any) -> bool:
    """Whether a leaf is a cache of keys and values whose samples can be chosen (transformers' ``Cache`` and kin)."""
    return hasattr(leaf, "reorder_cache") and hasattr(leaf, "get_seq_length") and not isinstance(leaf, nn.Module)


def is_opaque(leaf: Any, depth: int = 3) -> bool:
    """Whether a leaf is an object with tensors in its attributes, or a cache."""
    if leaf is None or isinstance(leaf, (Tensor, *_PLAIN)) or callable(leaf):
        return False
    if is_cache(leaf):
        return True
    return next(_held(leaf, depth), None) is not None
