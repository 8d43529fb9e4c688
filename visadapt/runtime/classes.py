"""Subclasses of a backbone's modules that keep them frozen, and of a task's that keep them in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from visadapt.backbone.subclass import ModuleClass, cached, subclass


def _never_trains(module: nn.Module) -> bool:
    return False


def _set_training(module: nn.Module, mode: bool) -> None:
    # remembered, so that an ejected module is in the mode that its parent was last put into
    module.__dict__["training"] = mode


@cached
def frozen_class(plain: ModuleClass) -> ModuleClass:
    """A subclass that is always in eval mode, whatever ``.train()`` a parent calls: its statistics stand still."""
    return subclass(plain, frozen_class, training=property(_never_trains, _set_training))


def _like(other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(other.dtype) if tensor.is_floating_point() else tensor


@cached
def widened_class(plain: ModuleClass) -> ModuleClass:
    """A norm or head in fp32 in a half-precision network: it computes in fp32 and answers in its input's dtype."""

    def forward(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Mapping | Sequence):
            # a tensor, or what stands for one while torch.fx traces
            out = plain.forward(self, x.float(), *args, **kwargs)
            return tree_map_only(Tensor, _like(x), out) if isinstance(out, Mapping | Sequence) else out.to(x.dtype)
        # a detector's head takes the maps of all levels
        first = next(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
        wide = tree_map_only(Tensor, _like(torch.empty(0)), x)
        return tree_map_only(Tensor, _like(first), plain.forward(self, wide, *args, **kwargs))

    return subclass(plain, widened_class, forward=forward)
