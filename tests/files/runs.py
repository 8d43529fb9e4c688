"""Define what the old files other than task files are of: a decider, a training run, a prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import visadapt
from tests.files.backbones import images
from visadapt.frozen import CachedPrefix
from visadapt.training import Fit, Recipe, fit

# each epoch is one batch of all samples, so that no order is drawn; and with this eps AdamW does not divide the
# rounding errors of a vanishing gradient by their own size, so that the numbers are the same on every machine
RECIPE = Recipe(epochs=4, lr=1e-2, batch_size=6, warmup=0.25, eps=1e-3)


def decider_inputs() -> dict[str, Tensor]:
    """Return the inputs of each task that the decider chooses between: dark images and bright ones."""
    x = images(4)["x"] / 4
    return {"bottleneck": x - 1, "dan": x + 1}


def train(
    model: nn.Module, *, checkpoint: Path | None = None, log: Callable[[Fit], None] | tuple[()] = ()
) -> tuple[Fit, list[float]]:
    """Run the training that the checkpoint is of, or what is left of it; return it and its losses."""
    data = images(6)["x"], torch.arange(6) % 3
    history = fit(model, "bottleneck", data, recipe=RECIPE, prepare=as_is, checkpoint=checkpoint, log=log, seed=1)
    return history, [epoch.loss for epoch in history.epochs]


def as_is(batch: Tensor) -> Tensor:
    """Return the batch: the images are prepared already."""
    return batch


def cache(model: nn.Module, file: Path) -> CachedPrefix:
    """Return the prefix cache of the task that trains in the last stage only."""
    return visadapt.cache_prefix(model, "bottleneck-late", images(4)["x"], file=file)
