"""``lean``: a frozen backbone that remembers, and computes, only what a frozen backbone must."""

from __future__ import annotations

from typing import Any

import torch

from visadapt.backbone.batchnorm import find_pairs
from visadapt.backbone.modules import LEAN, ModelT, own_modules, unwrapped
from visadapt.errors import VisadaptError
from visadapt.frozen.folds import Folds, lean_root
from visadapt.frozen.layers import MAKERS, Lean, maker_for
from visadapt.runtime.host import dress, undress
from visadapt.runtime.registry import registry_of


def lean(model: ModelT, *, keep: torch.dtype | None = None, example: Any = None) -> ModelT:
    """Make the frozen layers of an injected model lean, for training and for inference.

    An eval-mode BatchNorm is folded into the conv before it wherever the task owns neither; convs keep no input, ReLUs
    one bit an element, max-pools their indices. A bottleneck adapter keeps its input once, and not at all where it
    stands behind a BatchNorm that the task owns, which keeps its own. Gradients and outputs are those of the plain
    model up to rounding (a folded norm rounds otherwise). Nothing in ``state_dict`` changes; `unlean` undoes it
    exactly. To compute again what is kept, adapters' inputs too, switch on the backbone's own checkpointing: timm's
    ``set_grad_checkpointing()``, say.

    Args:
        model: an injected model. Tasks may come and go afterwards.
        keep: a dtype in which to keep what the backward pass needs of an adapter's, a norm's or an activation's input,
            such as ``torch.bfloat16``: half the bytes, outputs as before, gradients rounded to that dtype's precision.
            None keeps everything in its own. A model that is lean already goes on with this one.
        example: an input to find out with which norm follows which conv, as `visadapt.sites` takes it.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected, or ``keep`` is not a floating-point dtype.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3).train()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> plain = model(images)
        >>> lean = visadapt.lean(model)(images)  # keeps less for the backward pass
        >>> torch.allclose(lean, plain, atol=1e-4)
        True
    """
    registry = registry_of(model)
    backbone = unwrapped(model)
    if keep is not None and not (isinstance(keep, torch.dtype) and keep.is_floating_point):
        raise VisadaptError(f"keep must be a floating-point dtype such as torch.bfloat16, or None, got {keep!r}")
    if registry.lean is not None:
        registry.lean.keep = keep
        return model
    try:
        found = find_pairs(backbone, example)
    except VisadaptError:
        # a backbone whose input cannot be guessed is lean without folding
        found = []
    folds = Folds(registry)
    pairs = folds.add(backbone, found)
    registry.lean = Lean(keep)
    if found and maker_for(backbone) is None:
        backbone.__dict__[LEAN] = folds
        dress(backbone, lean_root)
    for module in own_modules(backbone).values():
        make = maker_for(module)
        if make is not None:
            module.__dict__[LEAN] = pairs.get(module, registry.lean)
            dress(module, make)
    for name in registry.tasks:
        for parts in registry.parts(name).values():
            for part in parts.values():
                registry.lean.apply(part)
    return model


def unlean(model: ModelT) -> ModelT:
    """Undo `lean`, exactly.

    Args:
        model: an injected model, lean or not.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected.
    """
    registry = registry_of(model)
    for module in unwrapped(model).modules():
        if module.__dict__.pop(LEAN, None) is not None:
            undress(module, *MAKERS)
    registry.lean = None
    return model
