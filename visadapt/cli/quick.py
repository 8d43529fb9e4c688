"""The quick setting of ``train``: a first result in minutes on two cores, where options are not given."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from visadapt.data.images import ImageSplit
from visadapt.data.inputs import ImageInputs, TextInputs
from visadapt.data.splits import Splits
from visadapt.errors import VisadaptError
from visadapt.frozen.cached_prefix import CachedPrefix, cache_prefix
from visadapt.frozen.prefix import Prefix
from visadapt.runtime.registry import facts_of
from visadapt.training import Recipe, Samples
from visadapt.training.engine import Engine

STEPS = 60
"""Steps that a training run should have: small sets take more epochs for them."""

EPOCHS = 6
"""Most epochs that a small set is given."""

PATIENCE = 2
"""Epochs without a better score after which training stops."""

PIXELS = 25e6
"""Pixels of training images in all epochs: one to two minutes of a ResNet-50 with adapters on two cores."""

WORTH = 0.01
"""Share of the backbone's parameters from which what lies below the first site is computed once: a first layer's
features take more memory than they save time."""

SIDES = range(64, 225, 32)
"""Sides of images for the bundled ResNet-50, in pixels."""


def quick_recipe(recipe: Recipe, count: int) -> dict[str, Any]:
    """Choose the epochs, and when to stop, for a number of training samples.

    Args:
        recipe: the recipe, with the options that were given.
        count: number of training samples.
    """
    steps = -(-count // recipe.batch_size)
    return {"epochs": max(recipe.epochs, min(EPOCHS, -(-STEPS // max(1, steps)))), "patience": PATIENCE}


def quick_size(count: int, epochs: int) -> int:
    """Choose the side of the images for the bundled ResNet-50, in pixels.

    Args:
        count: number of training images.
        epochs: most passes over them.
    """
    return max((side for side in SIDES if count * epochs * side**2 <= PIXELS), default=SIDES[0])


def cached_data(
    model: nn.Module, task: str, splits: Splits, device: str | None, precision: str | None, limit: float
) -> tuple[CachedPrefix, Any, Any] | None:
    """Compute once what lies below the first site that a task trains, for training and validation samples.

    Args:
        model: the injected model; moved to the device.
        task: its name.
        splits: the data; only samples in memory are cached.
        device: of ``fit``.
        precision: of ``fit``.
        limit: bytes that the features may take.

    Returns:
        The cache, and the training and validation data for ``fit(…, prepare=cache)``; None where nothing that is worth
        it lies below that site, or its features pass the limit.
    """
    train, validation, inputs = splits.train, splits.validation, splits.inputs
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    if isinstance(inputs, ImageInputs) and isinstance(train, ImageSplit) and isinstance(validation, ImageSplit):
        if train.images.shape[1:] != validation.images.shape[1:]:
            return None
        together: Any = torch.cat([train.images, validation.images])
        prepare: Any = inputs
    elif isinstance(inputs, TextInputs) and isinstance(train, Samples) and isinstance(validation, Samples):
        # of one length, so that all features have one shape
        together = inputs.collate([train.inputs, validation.inputs])  # type: ignore[list-item]
        prepare = dict
    else:
        return None
    engine = Engine(model, device, precision)

    def placed(batch: Any) -> Any:
        return prepare(engine.place(batch))

    try:
        first = placed(together[:2] if isinstance(together, torch.Tensor) else {k: v[:2] for k, v in together.items()})
        if _share_below(model, task, first) < WORTH:
            return None
        with engine.autocast():
            cached = cache_prefix(model, task, together, prepare=placed, limit=limit)
    except VisadaptError:
        # every site trains, the prefix is more than one tensor, or its features are too large
        return None
    count = len(train)
    return cached, (cached.rows[:count], train.labels), (cached.rows[count:], validation.labels)


def _share_below(model: nn.Module, task: str, example: Any) -> float:
    """The share of the backbone's parameters that lies below the first site of a task, tables to look up left out."""
    prefix = Prefix(model, task, example)
    try:
        computed = [module for module in prefix.spared if not isinstance(module, nn.Embedding)]
        own = sum(tensor.numel() for module in computed for tensor in module.parameters(recurse=False))
        return own / max(1, facts_of(model).size)
    finally:
        prefix.close()
