"""Image data sets in memory: bundled, from scikit-learn, torchvision and ``datasets``, folders and tables of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.arguments import check_fields, takes
from visadapt.checks import check_count, check_non_negative
from visadapt.data.image_file import square_pixels, to_tensor
from visadapt.data.image_layouts import files_below
from visadapt.data.image_sources import find
from visadapt.data.lazy_images import DAMAGED, SizesDifferError, held, read_all
from visadapt.data.splits import indices_of
from visadapt.data.targets import check_form, check_range, held_out
from visadapt.errors import VisadaptError, nearest
from visadapt.reading import check_file


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and their labels.

    Args:
        images: uint8, ``(N, 3, H, W)``; gray images have three equal channels.
        labels: class indices, int64 ``(N,)``; real values, float ``(N,)``; or bool ``(N, C)``, True for every label
            that applies.

    Examples:
        >>> from visadapt.data import ImageSplit
        >>> split = ImageSplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        >>> split.subset([0, 2]).labels
        tensor([0, 0])
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            shape, dtype = tuple(self.images.shape), self.images.dtype
            raise VisadaptError(f"images must be uint8 of shape (N, 3, H, W), got {dtype} of shape {shape}")
        check_form(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSplit:
        """Return the samples at these indices, in this order.

        Raises:
            VisadaptError: they are not indices of samples.
        """
        index = indices_of(indices, len(self))
        return ImageSplit(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image data set.

    Args:
        name: the name it was loaded by.
        classes: the name of each label; empty for real values.
        train: training split; `holdout` takes a validation split from it.
        test: test split.
        validation: validation split, if the data set has one of its own.
        remarks: what the library decided, for the user to know.

    Examples:
        >>> from visadapt.data import load_images
        >>> images = load_images("mnist")
        >>> train, validation = images.holdout(200)
        >>> len(train), len(validation), len(images.test)
        (1800, 200, 1000)
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSplit
    test: ImageSplit
    validation: ImageSplit | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for split in filter(None, (self.train, self.test, self.validation)):
            check_range(split.labels, self.classes, self.name)

    @takes()
    def holdout(self, n: int, seed: int = 0) -> tuple[ImageSplit, ImageSplit]:
        """Split the training split into training and validation, with the same class proportions in both.

        Args:
            n: number of validation samples.
            seed: the same seed chooses the same samples.

        Raises:
            VisadaptError: ``n`` is not between 1 and the number of training images minus 1.
        """
        left, chosen = held_out(self.train.labels, n, seed)
        return self.train.subset(left), self.train.subset(chosen)


@takes()
def load_images(
    data: Any,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = False,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    damaged: float = DAMAGED,
    online: bool = False,
    **columns: Any,
) -> ImageSet:
    """Load an image data set into memory.

    Args:
        data: one of
            ``"cifar10"`` (5,000 / 2,000 images, 32×32), ``"mnist"`` and ``"fashion-mnist"`` (2,000 / 1,000, 28×28):
            balanced subsets, bundled;
            ``"digits"``: scikit-learn's 8×8 digits (1,437 / 360, a fixed stratified split);
            ``"torchvision/CIFAR10"`` and so on: a classification data set of ``torchvision.datasets`` in ``root``;
            a folder with one folder of images per class, of which 20 % become the test split; or with such folders in
            ``train`` and ``test`` (or ``val``), in any case;
            a table (``.csv`` or ``.tsv``) of file names and labels, perhaps with a column ``split``;
            a ``Dataset`` or ``DatasetDict`` of the ``datasets`` library, or a folder that ``save_to_disk`` wrote;
            ``"hf/NAME"``: an image data set of the Hugging Face hub.
        root: folder of torchvision's data sets; the folder from which a table names its images.
        size: resize the shorter side to ``size`` pixels and crop the centre square. Required if the images of a
            folder or of a torchvision data set differ in size.
        download: let torchvision download a data set that is not in ``root``.
        classes: class names, if the training images need not have all of them; None to take their own.
        seed: of a split that the data does not have.
        damaged: fraction of the images of a split that may be damaged; a warning names those that are skipped.
        online: whether ``"hf/NAME"`` may be downloaded.
        **columns: of a table: ``image``, ``label``, ``header``, ``delimiter``, ``encoding``, ``regression`` (labels are
            real values) and ``multi_label`` (the text between the labels of one cell).

    Returns:
        The data set, uint8 on the CPU.

    Raises:
        VisadaptError: the data set or folder does not exist, its layout is not as above, its images differ in size and
            ``size`` is not given, too many are damaged, or a required library is missing.

    Examples:
        >>> from visadapt.data import load_images
        >>> images = load_images("mnist")
        >>> images.train.images.shape, images.train.labels.shape, images.classes[:3]
        (torch.Size([2000, 3, 28, 28]), torch.Size([2000]), ('0', '1', '2'))
    """
    check_non_negative(damaged, "damaged")
    if size is not None and size < 1:
        raise VisadaptError(f"size must be at least 1 pixel, got {size}")
    found = find(data, root=root, download=download, classes=classes, online=online, **columns)
    found = found.completed(seed, validation=False)
    pixels = to_tensor if size is None else partial(square_pixels, size=size)
    splits = {name: ImageSplit(*held(files.read_as(pixels), damaged)) for name, files in found.splits.items()}
    return ImageSet(found.name, found.classes, **splits, remarks=found.remarks)


@takes()
def load_squares(name_or_path: str | Path, size: int, **options: Any) -> ImageSet:
    """Load an image data set whose images can be resized to any side without distortion.

    Args:
        name_or_path: as `load_images` takes it.
        size: side to resize and crop to, unless all images are squares of one size already: these are kept, since small
            images take less memory.
        **options: passed to `load_images`.

    Returns:
        The data set, uint8 on the CPU.

    Examples:
        >>> from visadapt.data import load_squares
        >>> load_squares("mnist", 64).train.images.shape  # squares already
        torch.Size([2000, 3, 28, 28])
    """
    check_count(size, "size")
    try:
        found = load_images(name_or_path, **options)
    except SizesDifferError:
        return load_images(name_or_path, size=size, **options)
    square = all(split.images.shape[-2] == split.images.shape[-1] for split in (found.train, found.test))
    return found if square else load_images(name_or_path, size=size, **options)


@takes()
def image_files(place: str | Path) -> list[Path]:
    """List image files: the file itself, or all image files below a folder, sorted.

    Hidden files and folders are left out.

    Args:
        place: the file or folder.

    Returns:
        Their paths.

    Raises:
        VisadaptError: the file or folder does not exist, or holds no image.

    Examples:
        >>> from visadapt.data import image_files
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30)).save("rose.png")
        >>> [file.name for file in image_files(".")]
        ['rose.png']
    """
    path = Path(place)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        check_file(path, "place", "an image or a folder")
        siblings = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise VisadaptError(f"no image or folder {place}{nearest(path.name, siblings)}")
    found = files_below(path)
    if not found:
        raise VisadaptError(f"{place} must have at least one image, got none")
    return found


@takes()
def read_images(files: Iterable[Any], size: int) -> Tensor:
    """Read images, resize the shorter side to ``size`` pixels and crop the centre square.

    Args:
        files: paths of the images, or images of Pillow.
        size: side of the squares in pixels.

    Returns:
        uint8, ``(N, 3, size, size)``.

    Raises:
        VisadaptError: a file is not a readable image, or ``files`` is empty.

    Examples:
        >>> from visadapt.data import read_images
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30)).save("rose.png")
        >>> read_images(["rose.png"], size=16).shape
        torch.Size([1, 3, 16, 16])
    """
    check_count(size, "size")
    return read_all(files, partial(square_pixels, size=size))
