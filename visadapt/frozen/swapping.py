"""Class swaps that are taken out by what put them in, whatever was put on top of them since."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from visadapt.runtime.classes import Maker


def take_out(module: nn.Module, makers: Collection[Maker]) -> None:
    """Takes the classes that ``makers`` made out of a module's, and leaves what others made.

    Under a class that another library put on top (a parametrization, FSDP2) it leaves them all: they have to do nothing
    once the attribute that they read is gone.
    """
    if "_visadapt_recipe" not in type(module).__dict__:
        return
    cls, made = type(module)._visadapt_recipe  # type: ignore[attr-defined]
    for make in made:
        if make not in makers:
            cls = make(cls)
    module.__class__ = cls
