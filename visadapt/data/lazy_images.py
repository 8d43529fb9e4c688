"""Labelled images that are read when they are needed, and reading all of them into memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visadapt.arguments import check_fields, reading, takes
from visadapt.checks import check_count
from visadapt.data.image_file import read_image, to_tensor
from visadapt.data.splits import indices_of
from visadapt.errors import VisadaptError, option

if TYPE_CHECKING:
    from PIL.Image import Image

HELD = 10**9
"""Bytes of images that are kept in memory; larger sets are read again in every epoch."""

DAMAGED = 0.05
"""Fraction of the images of a split that may be damaged: they are listed and skipped."""

Pixels = Callable[["Image"], Tensor]


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels, as a data set of torch: each image is read when it is asked for.

    Args:
        items: what `visadapt.data.image_file.read_image` takes: paths, images of the ``datasets`` library, or
            all images as one uint8 tensor.
        labels: class indices or real values ``(N,)``, or bool ``(N, C)``, True for every label that applies.
        pixels: converts an RGB image to a uint8 tensor ``(3, H, W)``.
        name: for messages.

    Examples:
        >>> from visadapt.data import ImageFiles
        >>> files = ImageFiles(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> image, label = files[1]
        >>> image.shape, int(label)
        (torch.Size([3, 8, 8]), 1)
    """

    items: Sequence[Any] | Tensor
    labels: Tensor
    pixels: Pixels = to_tensor
    name: str = "images"

    def __post_init__(self) -> None:
        check_fields(self, "items")
        if len(self.labels) != len(self.items):
            raise VisadaptError(f"labels must have one entry per image, got {len(self.labels)} for {len(self.items)}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels(read_image(self.items[index])), self.labels[index]

    def subset(self, indices: Tensor | Sequence[int]) -> ImageFiles:
        """Return the images at these indices, in this order, unread.

        Raises:
            VisadaptError: they are not indices of images.
        """
        index = indices_of(indices, len(self))
        items = self.items[index] if isinstance(self.items, Tensor) else _Taken(self.items, index.tolist())
        return replace(self, items=items, labels=self.labels[index])

    @takes()
    def read_as(self, pixels: Pixels) -> ImageFiles:
        """Return the same images, to be converted by another function."""
        return replace(self, pixels=pixels)

    @takes()
    def batches(self, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
        """Return a loader that reads the images in worker processes, batch by batch.

        Args:
            batch_size: images per batch.
            shuffle: whether the order is random, anew in each pass.
            seed: of the order, and of random transforms.
        """
        check_count(batch_size, "batch_size")
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle=shuffle, num_workers=workers(), generator=generator)


class _Taken(Sequence[Any]):
    """Some elements of a sequence, without a copy: those of a stored data set are read from disk."""

    def __init__(self, whole: Sequence[Any], rows: Sequence[int]) -> None:
        self.whole, self.rows = whole, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[self.rows[index]]


def workers() -> int:
    """Number of processes that read images: one per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


class _Trial(Dataset[tuple[int, str]]):
    """The same images, of which only the error is returned, or an empty string."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            read_image(self.files.items[index])
        except VisadaptError as error:
            return index, str(error)
        return index, ""


def checked(files: ImageFiles, most: float = DAMAGED) -> ImageFiles:
    """Read every image once, and leave out those that are damaged.

    Args:
        files: the images.
        most: fraction of the images that may be damaged; one image may always be.

    Raises:
        VisadaptError: more images are damaged, or none can be read.
    """
    loader = DataLoader(_Trial(files), 64, num_workers=workers(), collate_fn=list)
    damaged = {index: error for batch in loader for index, error in batch if error}
    return files if not damaged else files.subset(_without(files, damaged, most))


def held(files: ImageFiles, most: float = DAMAGED) -> tuple[Tensor, Tensor]:
    """Read all images into memory, and leave out those that are damaged.

    Args:
        files: the images.
        most: as in `checked`.

    Returns:
        uint8 images ``(N, 3, H, W)`` and their labels.

    Raises:
        SizesDifferError: the images differ in size.
        VisadaptError: too many images are damaged.
    """
    if isinstance(files.items, Tensor) and files.pixels is to_tensor:
        return files.items, files.labels
    images: list[Tensor] = []
    damaged: dict[int, str] = {}
    for index in range(len(files)):
        try:
            image = files.pixels(read_image(files.items[index]))
        except VisadaptError as error:
            damaged[index] = str(error)
            continue
        images.append(image)
        if image.shape != images[0].shape:
            raise SizesDifferError(f"{files.name}: the images differ in size: give {option('size')}, such as size=224")
    if not len(files):
        raise VisadaptError(f"{files.name} must have at least one image, got none")
    labels = files.labels[_without(files, damaged, most)] if damaged else files.labels
    return torch.stack(images), labels


def read_all(sources: Iterable[Any], pixels: Pixels) -> Tensor:
    """Read images into memory, ``(N, 3, H, W)``.

    Raises:
        VisadaptError: an image cannot be read, or there is none.
    """
    with reading("images"):
        each = iter(sources)
    images = [pixels(read_image(source)) for source in each]
    if not images:
        raise VisadaptError("images must have at least one image, got none")
    return torch.stack(images)


class SizesDifferError(VisadaptError):
    """The images of a set differ in size, and no size was given."""


def _without(files: ImageFiles, damaged: dict[int, str], most: float) -> Tensor:
    """The indices of the other images; warns of the damaged ones.

    Raises:
        VisadaptError: there are too many.
    """
    shown = "; ".join(list(damaged.values())[:3]) + ("; …" if len(damaged) > 3 else "")
    total = len(files)
    if len(damaged) > max(1, int(most * total)) or len(damaged) == total:
        raise VisadaptError(
            f"{files.name}: {len(damaged)} of {total} images cannot be read, and at most {most:.0%} may be skipped "
            f"({option('damaged')}): {shown}"
        )
    warnings.warn(f"{files.name}: skipping {len(damaged)} of {total} images: {shown}", stacklevel=4)
    return torch.tensor([index for index in range(total) if index not in damaged], dtype=torch.int64)
