"""Random changes of training images, by timm: crops, RandAugment, mixup and CutMix."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visadapt.checks import is_real
from visadapt.data.image_file import to_image
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
        if self.rand_augment is not None and not isinstance(self.rand_augment, str):
            raise VisadaptError(f"{option('rand_augment')} must be a configuration of timm, got {self.rand_augment!r}")
        if self.rand_augment is not None and self.random_crop is None:
            raise VisadaptError(f"{option('rand_augment')} needs {option('random_crop')}, such as 0.35")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= value <= 10:
                raise VisadaptError(f"{option(name)} must be a number from 0 to 10, got {value!r}")

    @property
    def crops(self) -> bool:
        """Whether each image is changed by itself."""
        return self.random_crop is not None

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def pixels(self, inputs: ImageInputs) -> Callable[[Image], Tensor]:
        """Return the random crop of an RGB image to uint8, ``(3, size, size)``.

        Args:
            inputs: how the backbone's images are prepared.

        Raises:
            VisadaptError: timm does not know the configuration of RandAugment, or the inputs are not bytes.
        """
        if not inputs.in_bytes:
            raise VisadaptError("images of this backbone's processor cannot be augmented: it gives no 8-bit values")
        return self._crop(inputs.size, inputs.size, inputs)

    def cropped(self, images: Tensor, inputs: ImageInputs | None, noise: torch.Generator) -> Tensor:
        """Crop the images of a batch at random; they keep their size.

        Args:
            images: uint8, ``(N, 3, H, W)``.
            inputs: how the backbone's images are prepared; None for ImageNet's mean, and bilinear resizing.
            noise: source of all random numbers.

        Raises:
            VisadaptError: the images have another form.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise VisadaptError(f"images for {option('random_crop')} must be uint8 (N, 3, H, W), got {_form(images)}")
        height, width = images.shape[-2:]
        crop = self._crop(height, width, inputs or ImageInputs(max(height, width)))
        with _seeded(noise):
            return torch.stack([crop(to_image(image)) for image in images.cpu()]).to(images.device)

    def mixed(self, images: Tensor, labels: Tensor, classes: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix the images of a batch in pairs; the last of an odd number stays as it is.

        Args:
            images: ``(N, 3, H, W)``, uint8 or floats.
            labels: class indices ``(N,)``.
            classes: number of classes.
            noise: source of all random numbers.

        Returns:
            The mixed images, and the shares of their classes, ``(N, classes)``.

        Raises:
            VisadaptError: the images or labels have another form.
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise VisadaptError(f"inputs of mixup and CutMix must be images (N, 3, H, W), got {_form(images)}")
        if labels.ndim != 1 or labels.is_floating_point():
            raise VisadaptError(f"labels for mixup and CutMix must be one class per image, got {_form(labels)}")
        mix = require("timm.data", "mixup and CutMix", "timm").Mixup(
            self.mixup, self.cutmix, label_smoothing=0.0, num_classes=classes
        )
        even = len(labels) // 2 * 2
        shares = F.one_hot(labels.long(), classes).float()
        if not even:
            return images, shares
        # a copy: timm writes to its argument
        floats = images.float() if images.dtype == torch.uint8 else images.clone()
        with _seeded(noise):
            floats[:even], shares[:even] = mix(floats[:even], labels[:even])
        return floats.round().to(torch.uint8) if images.dtype == torch.uint8 else floats, shares

    def _crop(self, height: int, width: int, inputs: ImageInputs) -> Callable[[Image], Tensor]:
        try:
            transform: Callable[[Image], Tensor] = require("timm.data", "augmentation", "timm").create_transform(
                (3, height, width),
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


@contextmanager
def _seeded(noise: torch.Generator) -> Iterator[None]:
    """Seed the generators that timm draws from, Python's, numpy's and torch's, and restore them afterwards."""
    numpy = require("numpy", "augmentation", "numpy")
    seed = int(torch.randint(2**31, (), generator=noise))
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def _form(value: Any) -> str:
    return f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
