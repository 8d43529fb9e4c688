"""``lean``: a frozen backbone that remembers, and computes, only what a frozen backbone must."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.errors import VisadaptError
from visadapt.folding import pairs
from visadapt.frozen.layers import Pair, maker_for
from visadapt.host import CHILD, LEAN, Maker, hosting_class
from visadapt.registry import registry_of, unwrapped
from visadapt.sites import own_modules


def lean(model: nn.Module, *, example: Any = None) -> nn.Module:
    """Makes the frozen layers of an injected model lean, for training and for inference.

    An eval-mode BatchNorm is folded into the conv before it wherever the task owns neither; convs keep no input, ReLUs
    one bit an element, max-pools their indices. Gradients and outputs are those of the plain model up to rounding (a
    folded norm rounds otherwise). Nothing in ``state_dict`` changes; :func:`unlean` undoes it exactly.

    Args:
        model: an injected model. Tasks may come and go afterwards.
        example: an input to find out with which norm follows which conv, as :func:`visadapt.sites` takes it.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected.
    """
    registry = registry_of(model)
    backbone = unwrapped(model)
    if registry.lean:
        return model
    try:
        found = pairs(backbone, example)
    except VisadaptError:
        # a backbone whose input cannot be guessed is lean without folding
        found = []
    folded: dict[nn.Module, Pair] = {}
    for conv_path, norm_path in found:
        conv, norm = backbone.get_submodule(conv_path), backbone.get_submodule(norm_path)
        folded[conv] = folded[norm] = Pair(registry, cast("nn.Conv2d", conv), cast("_BatchNorm", norm))
    for module in own_modules(backbone).values():
        make = maker_for(module, set(folded))
        if make is not None:
            module.__dict__[LEAN] = folded.get(module)
            _swap(module, make)
    registry.lean = True
    return model


def unlean(model: nn.Module) -> nn.Module:
    """Undoes :func:`lean`, exactly.

    Args:
        model: an injected model, lean or not.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected.
    """
    registry = registry_of(model)
    for module in own_modules(unwrapped(model)).values():
        if module.__dict__.pop(LEAN, "none") != "none":
            _swap(module, None)
    registry.lean = False
    return model


def _swap(module: nn.Module, make: Maker | None) -> None:
    """Puts a lean class under the hosting one, or takes it out (``make`` is None)."""
    cls = type(module)
    hosts = CHILD in module._modules
    base: Any = cls._visadapt_base if hosts else cls  # type: ignore[attr-defined]
    base = base._visadapt_base if make is None else make(base)
    module.__class__ = hosting_class(base) if hosts else base
