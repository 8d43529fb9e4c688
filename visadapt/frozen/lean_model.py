"""``lean``: a frozen backbone that keeps and computes only what it has to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visadapt.backbone.batchnorm import find_pairs
from visadapt.backbone.modules import LEAN, ModelT, own_modules, unwrapped
from visadapt.backbone.structure import STRUCTURE
from visadapt.backbone.subclass import made_by
from visadapt.backbone.trace import check_input
from visadapt.checks import check_choice, is_among
from visadapt.errors import VisadaptError
from visadapt.frozen.compacting import ORIGINALS, compact, places, restore, storing_class
from visadapt.frozen.folds import Folds, lean_root
from visadapt.frozen.layers import MAKERS, Lean, compact_maker_for, maker_for
from visadapt.frozen.precision import begin, note_precision
from visadapt.printable import shown
from visadapt.runtime.host import dress, undress
from visadapt.runtime.registry import Registry, registry_of


def lean(
    model: ModelT,
    *,
    keep: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    weights: str | None = None,
    original: str | None = "disk",
    example: Any = None,
) -> ModelT:
    """Save memory and time in the frozen layers of an injected model, in training and in inference.

    An eval-mode BatchNorm is folded into the conv before it wherever the task owns neither; convs keep no input, ReLUs
    one bit per element, max-pools their indices. A bottleneck adapter keeps its input once, and not at all behind a
    BatchNorm that the task owns, which keeps its own. Gradients and outputs are those of the plain model up to rounding
    (a folded norm rounds otherwise). Nothing in ``state_dict`` changes; `unlean` undoes it exactly. To recompute what
    is kept, adapters' inputs too, use the backbone's own checkpointing, such as timm's ``set_grad_checkpointing()``.

    ``compute`` and ``weights`` save more, and round the backbone. Convolutions, linears and attention's projections
    hold their frozen weights in half precision, or as 8-bit codes with a scale per output channel, and no copy in
    fp32: half or a quarter of the bytes (a folded norm needs another half with ``compute``, and nothing with codes).
    The originals are kept in a temporary file, which takes no memory, for `unlean`, `eject`, ``state_dict`` and the
    backbone's fingerprint: task files fit the backbone as before. Loading a checkpoint replaces them. Adapters,
    norms and heads stay in fp32. With ``compute`` a call of the whole model runs under autocast to that dtype, adapters
    included, and returns outputs in the model's own dtype; a layer that is called by itself returns its input's dtype.
    Such a model is not merged: call `unlean` first. A task that was trained on codes has a note that says so.

    Args:
        model: an injected model. Tasks may come and go afterwards.
        keep: a dtype in which to keep what the backward pass needs of an adapter's, a norm's or an activation's input,
            such as ``torch.bfloat16``: half the bytes, outputs as before, gradients rounded to that dtype's precision.
            None keeps everything in its own. A model that is lean already uses this one from now on.
        compute: ``torch.bfloat16`` (or ``float16``) for frozen layers that compute, and keep their weights, in that
            precision; None for the model's own.
        weights: ``"int8"`` for weights as codes, decoded at each use to the precision of the computation; tables of
            embeddings too. None stores them in the dtype of the computation.
        original: where the original weights are kept with ``compute`` or ``weights``: ``"disk"`` (a temporary file,
            placed by Python's ``tempfile``), ``"memory"``, or None for nowhere. Without them this cannot be undone.
        example: an input to find out which norm follows which conv, as `visadapt.sites` takes it.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected, or is lean in another precision already; an option is out of range;
            the model has no such weights, or has them on the meta device; the disk is full.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3).train()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> plain = model(images)
        >>> lean = visadapt.lean(model)(images)  # keeps less for the backward pass
        >>> torch.allclose(lean, plain, atol=1e-4)
        True
        >>> rounded = visadapt.lean(model, compute=torch.bfloat16)(images)
        >>> rounded.dtype, torch.allclose(rounded, plain, atol=0.1)
        (torch.float32, True)
        >>> torch.equal(visadapt.unlean(model)(images), plain)
        True
    """
    registry = registry_of(model)
    backbone = unwrapped(model)
    _check(keep, compute, weights, original)
    if example is not None:
        check_input(example, "example")
    with STRUCTURE:
        if registry.lean is None:
            registry.lean = _make_lean(backbone, registry, keep, example)
        registry.lean.keep = keep
        if compute is not None or weights is not None:
            _make_compact(backbone, registry, compute, weights, original)
    return model


def _check(keep: Any, compute: Any, weights: Any, original: Any) -> None:
    if keep is not None and not (isinstance(keep, torch.dtype) and keep.is_floating_point):
        raise VisadaptError(f"keep must be a floating-point dtype such as torch.bfloat16, or None, got {shown(keep)}")
    if not is_among(compute, (None, torch.bfloat16, torch.float16)):
        raise VisadaptError(f"compute must be torch.bfloat16, torch.float16 or None, got {shown(compute)}")
    check_choice(weights, (None, "int8"), "weights")
    check_choice(original, ORIGINALS, "original")


def _make_lean(backbone: nn.Module, registry: Registry, keep: torch.dtype | None, example: Any) -> Lean:
    try:
        found = find_pairs(backbone, example)
    except VisadaptError:
        # a backbone whose input cannot be guessed is lean without folding
        found = []
    made = Lean(keep, folds=Folds(registry))
    pairs = made.folds.add(backbone, found)
    if found:
        _watch_root(backbone, made)
    for module in own_modules(backbone).values():
        make = maker_for(module)
        if make is not None:
            module.__dict__[LEAN] = pairs.get(module, made)
            dress(module, make)
    for name in registry.tasks:
        for parts in registry.parts(name).values():
            for part in parts.values():
                made.apply(part)
    return made


def _watch_root(backbone: nn.Module, made: Lean) -> None:
    if maker_for(backbone) is None and LEAN not in backbone.__dict__:
        backbone.__dict__[LEAN] = made.folds
        dress(backbone, lean_root)


def _make_compact(
    backbone: nn.Module, registry: Registry, compute: torch.dtype | None, weights: str | None, original: str | None
) -> None:
    made: Lean = registry.lean
    if made.is_compact:
        if (compute, weights) != (made.compute, made.weights):
            raise VisadaptError(f"this model is lean already, {made.told}: call visadapt.unlean first")
        return
    compact(backbone, compute, weights == "int8", original)
    made.compute, made.weights = compute, weights
    for _, module, name, _ in places(backbone):
        dress(module, storing_class)
        make = compact_maker_for(module)
        if make is not None:
            module.__dict__[LEAN] = made
            dress(module, make)
        if made.folds.anchor is None and name == "weight":
            made.folds.anchor = module
    _watch_root(backbone, made)
    begin(registry, registry.tasks)


def unlean(model: ModelT) -> ModelT:
    """Undo `lean`, exactly: the original weights are read back from where they are kept.

    Args:
        model: an injected model, lean or not.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was never injected, or the originals were not kept (``original=None``). Nothing was
            changed then.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> visadapt.unlean(visadapt.lean(model)) is model
        True
    """
    registry = registry_of(model)
    with STRUCTURE:
        if registry.lean is not None and registry.lean.is_compact:
            restore(unwrapped(model))
            note_precision(registry)
        for module in unwrapped(model).modules():
            if module.__dict__.pop(LEAN, None) is not None or storing_class in made_by(type(module)):
                undress(module, *MAKERS)
        registry.lean = None
    return model
