"""Random changes of training batches: the caller's own, then those of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visadapt.data.augmentation import Augmentation
from visadapt.data.image_inputs import ImageInputs
from visadapt.data.lazy_images import ImageFiles
from visadapt.errors import VisadaptError, option
from visadapt.training.forms import is_dataset, loader_of, samples_of
from visadapt.training.recipe import Recipe

Augment = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class Changes:
    """How the batches of a training run are changed before ``prepare``.

    Args:
        augment: the caller's function; None for none.
        augmentation: of the recipe.
        inputs: how the backbone's images are prepared, if that is known.
        classes: outputs of the head; needed to mix labels.
        cropped: whether the images are cropped when they are read from their files.
    """

    augment: Augment | None
    augmentation: Augmentation
    inputs: ImageInputs | None
    classes: int | None
    cropped: bool

    def __post_init__(self) -> None:
        if self.augmentation.mixes and self.classes is None:
            raise VisadaptError("mixup and CutMix need a task with a head of its own: its classes are mixed")

    def __call__(self, inputs: Any, labels: Tensor, noise: torch.Generator) -> tuple[Any, Tensor]:
        """Change a batch on its device.

        Args:
            inputs: of the batch.
            labels: one row per sample.
            noise: source of all random numbers.

        Raises:
            VisadaptError: the recipe's changes do not apply to such inputs or labels.
        """
        if self.augment is not None:
            inputs = self.augment(inputs, noise)
        if self.augmentation.crops and not self.cropped:
            inputs = self.augmentation.cropped(inputs, self.inputs, noise)
        if self.augmentation.mixes:
            assert self.classes is not None
            return self.augmentation.mixed(inputs, labels, self.classes, noise)
        return inputs, labels


def training_batches(data: Any, recipe: Recipe, prepare: Any, seed: int) -> Any:
    """Read the samples of a data set in a random order, images from files cropped as the recipe says.

    Other data are returned as they are.

    Args:
        data: what ``fit`` takes.
        recipe: of the training run.
        prepare: of ``fit``.
        seed: of the order and the crops.

    Raises:
        VisadaptError: images are to be cropped, and how the backbone's images are prepared is not known.
    """
    if not isinstance(data, ImageFiles):
        if is_dataset(data) and samples_of(data, "training") is None:
            return loader_of(data, recipe.batch_size, "training", shuffle=True, seed=seed)
        return data
    if recipe.augmentation.crops:
        if not isinstance(prepare, ImageInputs):
            raise VisadaptError(
                f"prepare= must be the backbone's inputs for {option('random_crop')} of images in files, "
                f"got {type(prepare).__name__}"
            )
        data = data.read_as(recipe.augmentation.pixels(prepare))
    return data.batches(recipe.batch_size, shuffle=True, seed=seed)
