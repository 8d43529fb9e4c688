"""Subclasses of a backbone's modules that keep them frozen, and of a task's that keep them in fp32."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

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


@cached
def widened_class(plain: ModuleClass) -> ModuleClass:
    """A norm or head in fp32 in a half-precision network: it computes in fp32 and answers in its input's dtype."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast("Tensor", plain.forward(self, x.float(), *args, **kwargs)).to(x.dtype)

    return subclass(plain, widened_class, forward=forward)
