"""Caches of functions: a run on fake tensors leaves none of these in them."""

from __future__ import annotations

import functools
import gc
from types import MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from visadapt.backbone.subclass import plain_class

_Cached = type(functools.lru_cache(lambda: None))


def drop_caches(model: nn.Module) -> None:
    """Replace cached methods that modules of a copy hold as attributes, which ``deepcopy`` shares with the original.

    transformers keeps the anchors and position embeddings of its detectors in such attributes.

    Args:
        model: the copy; the cached methods of its modules become the copy's own, without a cache.
    """
    for module in model.modules():
        for name, held in module.__dict__.items():
            if isinstance(held, _Cached):
                function: Any = held.__wrapped__
                # of the original, unless it is of something else
                owner: Any = function.__self__ if isinstance(function, MethodType) else None
                bound = isinstance(owner, nn.Module) and plain_class(owner) is plain_class(module)
                module.__dict__[name] = MethodType(function.__func__, module) if bound else function


class NotedFakes(FakeTensorMode):
    """A mode that knows whether something still holds a tensor that was computed in it; it takes real inputs too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_non_fake_inputs=True, **options)
        self._made: list[ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        self._made += [ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def are_held(self) -> bool:
        """Whether one of the tensors is alive."""
        return any(made() is not None for made in self._made)


def forget_fakes() -> None:
    """Clear every ``functools`` cache of this process that holds a fake tensor.

    A function with a cache that was called with sizes only would give the fake tensor to the next forward of any model.
    All objects of the process are looked at, which takes long where there are many.
    """
    for cached in [each for each in gc.get_objects() if type(each) is _Cached]:
        if cached.cache_info().currsize and _holds_fakes(cached):
            cached.cache_clear()


def _holds_fakes(cached: Any) -> bool:
    # its results, or the table of them, beside the function and what the function is
    waiting = [held for held in gc.get_referents(cached) if type(held) is not dict or "__wrapped__" not in held]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, FakeTensor):
            return True
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in (tuple, list, dict):
            waiting += value.values() if isinstance(value, dict) else value
    return False
