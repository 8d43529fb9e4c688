"""How a batch may be split into samples: the possible batch axes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from visadapt.backbone.batch import ITEMS, Axis, Key, is_cache, leaves


def size_of(given: Any) -> Any:
    """Return the apparent batch size, for messages."""
    first = next((leaf for _, leaf in leaves(given) if isinstance(leaf, Tensor)), None)
    return "no tensors" if first is None else first.shape[0] if first.ndim else 0


def possible_cuts(given: Any, samples: int) -> Iterator[dict[Key, Axis]]:
    """Yield the possible batch axes of a batch of N samples, the most likely first.

    First the first axis of size N of every tensor, then other axes of size N, then lists of N elements. A tensor may
    have size N by chance, so each one is also left out once.
    """
    lists = {
        key
        for key, value in _nodes(given)
        if len(key) > 1 and isinstance(value, tuple | list) and len(value) == samples and _holds_tensors(value)
    }
    options: dict[Key, list[Axis]] = {}
    caches = {key for key, leaf in leaves(given) if is_cache(leaf)}
    for key, leaf in leaves(given):
        if isinstance(leaf, Tensor):
            axes: list[Axis] = [axis for axis, size in enumerate(leaf.shape) if size == samples]
            if axes:
                options[key] = axes
        elif key in caches:
            options[key] = [0]
    usual = {key: axes[0] for key, axes in options.items()}
    tried: list[dict[Key, Axis]] = []
    for cut in _variants(usual, options, lists):
        if cut.keys() - caches and cut not in tried:
            tried.append(cut)
            yield cut
        if len(tried) == 16:
            return


def _variants(usual: dict[Key, Axis], options: dict[Key, list[Axis]], lists: set[Key]) -> Iterator[dict[Key, Axis]]:
    yield usual
    for key, axes in options.items():
        for axis in axes[1:]:
            yield {**usual, key: axis}
    second = {key: axes[min(1, len(axes) - 1)] for key, axes in options.items()}
    yield second
    if lists:
        outer = {key for key in lists if not any(key[: len(other)] == other for other in lists - {key})}
        yield {
            **{key: axis for key, axis in usual.items() if not any(key[: len(o)] == o for o in outer)},
            **dict.fromkeys(outer, ITEMS),
        }
    for key in options:
        if len(options) > 1:
            yield {other: axis for other, axis in usual.items() if other != key}


def _nodes(tree: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    yield key, tree
    if isinstance(tree, tuple | list | Mapping):
        for step, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _nodes(value, (*key, step))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in leaves(value))
