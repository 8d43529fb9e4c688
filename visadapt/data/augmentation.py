"""Random changes of training images, by timm: crops, RandAugment, mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from visadapt.checks import is_real
from visadapt.data.image_inputs import ImageInputs
from visadapt.errors import VisadaptError, option
from visadapt.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed, anew in each epoch.

    Args:
        random_crop: smallest area of a random crop, as a fraction of the image, in (0, 1]; the crop is resized
            (RandomResizedCrop) and mirrored half of the time. None crops as for evaluation.
        rand_augment: timm's configuration of RandAugment (Cubuk et al. 2019, arXiv 1909.13719), such as
            ``"rand-m9-mstd0.5"``; ``"augmix-…"`` and ``"original"`` work too. Needs ``random_crop``.
        mixup: alpha of mixup (Zhang et al. 2017, arXiv 1710.09412); 0 for none.
        cutmix: alpha of CutMix (Yun et al. 2019, arXiv 1905.04899); 0 for none. With both, each batch takes one.

    Raises:
        VisadaptError: a value is out of range.
    """

    random_crop: float | None = None
    rand_augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.random_crop is not None and not (is_real(self.random_crop) and 0 < self.random_crop <= 1):
            raise VisadaptError(f"{option('random_crop')} must be a fraction in (0, 1], got {self.random_crop!r}")
        if self.rand_augment is not None and self.random_crop is None:
            raise VisadaptError(f"{option('rand_augment')} needs {option('random_crop')}, such as 0.35")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= value <= 10:
                raise VisadaptError(f"{option(name)} must be a number from 0 to 10, got {value!r}")

    def pixels(self, inputs: ImageInputs) -> Callable[[Image], Tensor] | None:
        """Return the conversion of training images to uint8, for `ImageInputs.load`; None if nothing changes.

        Args:
            inputs: how the backbone's images are prepared.

        Raises:
            VisadaptError: timm does not know the configuration of RandAugment, or the inputs are not bytes.
        """
        if self == Augmentation():
            return None
        if not inputs.in_bytes:
            raise VisadaptError("images of this backbone's processor cannot be augmented: it gives no 8-bit values")
        if self.random_crop is None:
            return inputs.pixels
        data = require("timm.data", "augmentation", "timm")
        try:
            transform: Callable[[Image], Tensor] = data.create_transform(
                (3, inputs.size, inputs.size),
                is_training=True,
                scale=(self.random_crop, 1.0),
                auto_augment=self.rand_augment,
                color_jitter=None,
                interpolation=inputs.interpolation,
                mean=inputs.mean,
                use_prefetcher=True,
            )
        except (AssertionError, ValueError, KeyError, AttributeError) as error:
            raise VisadaptError(
                f"{option('rand_augment')} must be a configuration of timm, such as rand-m9-mstd0.5, "
                f"got {self.rand_augment!r}"
            ) from error
        return transform

    def collate(self, classes: int) -> Callable[[Sequence[Any]], Any] | None:
        """Return what makes a batch of samples, with mixed labels ``(N, classes)``; None if batches are not mixed.

        Args:
            classes: number of classes.
        """
        if not self.mixup and not self.cutmix:
            return None
        timm = require("timm.data", "mixup and CutMix", "timm")
        mix = timm.FastCollateMixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=classes)
        return partial(_mixed, mix=mix, classes=classes)


def _mixed(batch: Sequence[Any], mix: Any, classes: int) -> tuple[Tensor, Tensor]:
    """Mix the samples of a batch in pairs; the last of an odd number stays as it is."""
    even = len(batch) // 2 * 2
    parts = [mix(list(batch[:even]))] if even else []
    if even < len(batch):
        image, label = default_collate(list(batch[even:]))
        parts.append((image, F.one_hot(label, classes).float()))
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
