"""Images for a vision backbone, prepared as its publisher prepared them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visadapt.checks import check_choice
from visadapt.data.image_file import check_resized, square_pixels, to_tensor
from visadapt.data.image_layouts import Found
from visadapt.data.image_sources import find
from visadapt.data.images import ImageSplit
from visadapt.data.lazy_images import DAMAGED, HELD, ImageFiles, Pixels, checked, held, read_all
from visadapt.data.splits import Splits, without_samples
from visadapt.data.targets import problem_type
from visadapt.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.typed import check_integer, fits

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 8192
"""Upper bound of the image side in pixels, so that no file can exhaust the memory."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")

CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class ImageInputs:
    """Images for a vision backbone; calling it with a uint8 batch returns the normalised batch that the backbone takes.

    Args:
        size: side of the square images in pixels.
        mean: mean per channel, in units of 1.
        std: standard deviation per channel, in units of 1.
        crop_pct: side of the crop as a fraction of the resized image, as timm's ``create_transform`` takes it.
        interpolation: of the resize, as timm names it.
        crop_mode: ``center``, ``squash`` or ``border``, as timm names them. None resizes the shorter side to ``size``
            bilinearly and crops the centre, as tasks of older files were trained; ``crop_pct`` and ``interpolation`` do
            not apply then.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str | None = None

    def __post_init__(self) -> None:
        check_integer(self.size, LARGEST, "size", "pixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not fits(values, tuple[float, ...]) or len(values) != 3 or not all(map(math.isfinite, values)):
                raise VisadaptError(f"{name} must be three finite numbers, got {values!r}")
        if min(self.std) <= 0:
            raise VisadaptError(f"std must be three positive numbers, got {self.std!r}")
        if not 0.05 <= self.crop_pct <= 2:
            raise VisadaptError(f"crop_pct must be a number from 0.05 to 2, got {self.crop_pct!r}")
        check_choice(self.interpolation, INTERPOLATIONS, "interpolation")
        if self.crop_mode is not None:
            check_choice(self.crop_mode, CROP_MODES, "crop_mode")

    @property
    def in_bytes(self) -> bool:
        """Whether images are kept as uint8 and normalised batch by batch."""
        return True

    def __call__(self, images: Tensor) -> Tensor:
        return normalize(images, self.size, mean=self.mean, std=self.std)

    @property
    def form(self) -> tuple[str, Any]:
        """What inputs must have in common to be collated: ``("images", size)``."""
        return "images", self.size

    def collate(self, batches: Sequence[Tensor]) -> Tensor:
        """Join batches that were prepared one by one, ``(N, 3, size, size)``."""
        return torch.cat(list(batches))

    def pixels(self, image: Image) -> Tensor:
        """Resize and crop one RGB image; the result is uint8, ``(3, size, size)``."""
        if self.crop_mode is None:
            return square_pixels(image, self.size)
        check_resized(image, self.size)
        transform = _transform(self.size, self.crop_pct, self.interpolation, self.crop_mode, self.mean)
        return transform(image)  # type: ignore[no-any-return]

    def read(self, files: Iterable[Any]) -> Tensor:
        """Read image files, or images of Pillow, as uint8, ``(N, 3, size, size)``."""
        return read_all(files, self.pixels)

    def load(
        self,
        data: Any,
        *,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        whole: bool = False,
        damaged: float = DAMAGED,
        memory: int = HELD,
        training: Pixels | None = None,
        **options: Any,
    ) -> Splits:
        """Load a data set; splits that it lacks are made: 20 % for testing, 10 % of the rest for validation.

        Args:
            data: as `visadapt.data.load_images` takes it, or what `visadapt.data.image_sources.find` found.
            labels: class names in the task's order; None for those of the data.
            seed: seed of the splits.
            whole: make no splits: all images, or the test images where there are some, are the test split.
            damaged: fraction of the images of a split that may be damaged.
            memory: bytes of images to keep in memory; larger sets are `visadapt.data.ImageFiles`, which read
                their images when they are needed.
            training: converts a training image to uint8, ``(3, size, size)``, at random and anew in each epoch.
            **options: passed to `visadapt.data.load_images`.

        Raises:
            VisadaptError: an option applies to texts only; see `visadapt.data.load_images`.
        """
        found = data if isinstance(data, Found) else find(data, classes=labels, **options)
        if labels is not None:
            found = found.renumbered(labels)
        found = found.completed(seed, whole=whole)
        small = self.in_bytes and memory // max(1, 3 * self.size**2 * sum(map(len, found.splits.values())))

        def prepared(split: str) -> Any:
            if split not in found.splits:
                return None
            files = found.splits[split]
            if training is not None and split == "train":
                return checked(files.read_as(training), damaged)
            pixels = self._pixels_of(files)
            return (
                ImageSplit(*held(files.read_as(pixels), damaged)) if small else checked(files.read_as(pixels), damaged)
            )

        parts = {split: prepared(split) for split in ("train", "validation", "test")}
        kind = problem_type(next(iter(found.splits.values())).labels)
        # after reading, as all images of a class may be damaged
        few = without_samples(found.classes, parts["train"].labels, "images") if parts["train"] is not None else ()
        remarks = (*found.remarks, *(f"{found.name}: {remark}" for remark in few))
        return Splits(found.classes, **parts, inputs=self, remarks=remarks, problem_type=kind)

    def _pixels_of(self, files: ImageFiles) -> Pixels:
        # small squares in memory stay small, and are resized batch by batch
        small = isinstance(files.items, Tensor) and files.items.shape[-1] == files.items.shape[-2]
        return to_tensor if self.crop_mode is None and small else self.pixels


def _transform(
    size: int, crop_pct: float, interpolation: str, crop_mode: str, mean: tuple[float, ...]
) -> Callable[[Image], Tensor]:
    data = require("timm.data", "the preprocessing of the backbone", "timm")
    # the prefetcher's form: uint8, to be normalised as a batch
    transform: Callable[[Image], Tensor] = data.create_transform(
        (3, size, size),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=mean,
        use_prefetcher=True,
    )
    return transform
