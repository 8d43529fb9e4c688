"""Subclasses of a backbone's modules that keep them frozen, and of a task's that keep them in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map_only

from visadapt.backbone.subclass import ModuleClass, cached, subclass
from visadapt.errors import VisadaptError


def _never_trains(module: nn.Module) -> bool:
    return False


def _set_training(module: nn.Module, mode: bool) -> None:
    # kept, so that an ejected module is in the mode that its parent was last set to
    module.__dict__["training"] = mode


@cached
def frozen_class(plain: ModuleClass) -> ModuleClass:
    """A subclass that is always in eval mode, even if a parent's ``.train()`` is called: its statistics are constant.

    Code that resets the statistics of all norms of a model and collects them again (``update_bn``, Lightning's weight
    averaging) does not change these. A BatchNorm without statistics uses those of its batch in every mode.
    """

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        own = self.__dict__.get("_buffers", {}).get(name)
        if own is None or value is own or not {_LOADING, "_is_replica"}.isdisjoint(self.__dict__):
            plain.__setattr__(self, name, value)
        elif not _is_reset(own, name, value):
            raise VisadaptError(
                f"{name} of a {plain.__name__} belongs to a frozen backbone, which tasks share: it cannot be set. "
                "visadapt.eject the tasks first, or load it by load_state_dict"
            )

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.__dict__[_LOADING] = True
        try:
            plain._load_from_state_dict(self, *args, **kwargs)
        finally:
            del self.__dict__[_LOADING]

    members: dict[str, Any] = {
        "training": property(_never_trains, _set_training),
        "__setattr__": set_attribute,
        "_load_from_state_dict": load,
    }
    if issubclass(plain, _NormBase):
        members |= {"reset_running_stats": _reset_nothing, "num_batches_tracked": property(_count)}
    return subclass(plain, frozen_class, **members)


_LOADING = "_visadapt_loading"


@cached
def still_class(plain: ModuleClass) -> ModuleClass:
    """A subclass that is always in eval mode, of a module whose buffers a forward moved.

    Its forward may set them again, as one does that keeps a table for the size of its last input: they are put back
    after each forward of the whole model (see `visadapt.runtime.watch`).
    """
    return subclass(plain, still_class, training=property(_never_trains, _set_training))


def _reset_nothing(norm: nn.Module) -> None:
    """Leave frozen statistics as they are."""


def _count(norm: nn.Module) -> Any:
    # a copy: resetting it in place by ``*=`` does not change the backbone's
    if "num_batches_tracked" not in norm._buffers:
        raise AttributeError("num_batches_tracked")
    own = norm._buffers["num_batches_tracked"]
    return None if own is None else own.clone()


def _is_reset(own: Tensor, name: str, value: Any) -> bool:
    """Whether a value is what a norm's statistics are before any batch: zeros, and ones for the variance."""
    if not isinstance(value, Tensor) or value.shape != own.shape:
        return False
    return value.is_meta or bool((value == (1 if name == "running_var" else 0)).all())


def _like(other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(other.dtype) if tensor.is_floating_point() else tensor


@cached
def widened_class(plain: ModuleClass) -> ModuleClass:
    """A norm or head in fp32 in a half-precision network: it computes in fp32 and returns its input's dtype."""

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
