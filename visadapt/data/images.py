"""Image data sets: bundled, from scikit-learn, from torchvision, and folders of images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visadapt.data import bundled
from visadapt.data.bounded import read_image
from visadapt.data.splits import stratified
from visadapt.errors import VisadaptError, nearest
from visadapt.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

_BUNDLED = ("cifar10", "mnist", "fashion-mnist")

_TRAIN_FLAG = {"train": True}, {"train": False}

_SPLIT_NAME = {"split": "train"}, {"split": "test"}

# torchvision's classification sets with a labelled test split -> the options of the two splits
_TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), _TRAIN_FLAG),
    **dict.fromkeys(("Country211", "DTD", "Flowers102", "Food101", "GTSRB", "PCAM", "RenderedSST2"), _SPLIT_NAME),
    **dict.fromkeys(("STL10", "StanfordCars", "SVHN"), _SPLIT_NAME),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    **dict.fromkeys(("CLEVRClassification", "Imagenette"), ({"split": "train"}, {"split": "val"})),
}

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and their labels.

    Args:
        images: uint8, ``(N, 3, H, W)``; gray images have three equal channels.
        labels: class indices, int64, ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            shape, dtype = tuple(self.images.shape), self.images.dtype
            raise VisadaptError(f"images must be uint8 of shape (N, 3, H, W), got {dtype} of shape {shape}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            shape, dtype = tuple(self.labels.shape), self.labels.dtype
            raise VisadaptError(f"labels must be int64 of shape ({len(self.images)},), got {dtype} of {shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSplit:
        """Return the samples at these indices, in this order."""
        index = torch.as_tensor(indices)
        return ImageSplit(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image classification data set.

    Args:
        name: the name it was loaded by.
        classes: the name of each label.
        train: training split; `holdout` takes a validation split from it.
        test: test split.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSplit
    test: ImageSplit

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(self.classes):
                raise VisadaptError(f"{self.name}: labels must be from 0 to {len(self.classes) - 1}")

    def holdout(self, n: int, seed: int = 0) -> tuple[ImageSplit, ImageSplit]:
        """Split the training split into training and validation, with the same class proportions in both.

        Args:
            n: number of validation samples.
            seed: the same seed chooses the same samples.

        Raises:
            VisadaptError: ``n`` is not between 1 and the number of training images minus 1.
        """
        left, chosen = stratified(self.train.labels, n, seed)
        return self.train.subset(left), self.train.subset(chosen)


def load_images(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = False,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Load an image data set into memory.

    Args:
        name_or_path: one of
            ``"cifar10"`` (5,000 / 2,000 images, 32×32), ``"mnist"`` and ``"fashion-mnist"`` (2,000 / 1,000, 28×28):
            balanced subsets, bundled;
            ``"digits"``: scikit-learn's 8×8 digits (1,437 / 360, a fixed stratified split);
            ``"torchvision/CIFAR10"`` and so on: a classification data set of ``torchvision.datasets`` in ``root``;
            a folder with a ``train`` and a ``test`` (or ``val``) folder, each with one folder of images per class.
        root: folder of torchvision's data sets.
        size: resize the shorter side to ``size`` pixels and crop the centre square. Required if the images of a
            folder or of a torchvision data set differ in size.
        download: let torchvision download a data set that is not in ``root``.
        classes: class names, if the ``train`` folder need not have all of them; None to take the folder's own.

    Returns:
        The data set, uint8 on the CPU.

    Raises:
        VisadaptError: there is no such data set or folder, its layout is not as above, its images differ in size and
            ``size`` is not given, or a required library is missing.
    """
    name = str(name_or_path)
    if size is not None and size < 1:
        raise VisadaptError(f"size must be at least 1 pixel, got {size}")
    if name in (*_BUNDLED, "digits"):
        bundled.warn_of_namesake(name)
    if name in _BUNDLED:
        found = _bundled(name)
    elif name == "digits":
        found = _digits()
    elif name.startswith("torchvision/"):
        return _torchvision(name, root, size, download)
    elif Path(name).is_dir():
        return _folder(Path(name), size, classes)
    else:
        known = (*_BUNDLED, "digits", "torchvision/CIFAR10")
        raise VisadaptError(f"no image data set or folder {name!r}{nearest(name, known)}")
    if size is None:
        return found
    return ImageSet(name, found.classes, *(_resized(s, size) for s in (found.train, found.test)))


class _SizesDifferError(VisadaptError):
    pass


def load_squares(name_or_path: str | Path, size: int, **options: Any) -> ImageSet:
    """Load an image data set whose images can be resized to any side without distortion.

    Args:
        name_or_path: as `load_images` takes it.
        size: side to resize and crop to, unless all images are squares of one size already: these are kept, since small
            images take less memory.
        **options: passed to `load_images`.
    """
    try:
        found = load_images(name_or_path, **options)
    except _SizesDifferError:
        return load_images(name_or_path, size=size, **options)
    square = all(split.images.shape[-2] == split.images.shape[-1] for split in (found.train, found.test))
    return found if square else load_images(name_or_path, size=size, **options)


def _bundled(name: str) -> ImageSet:
    pil = _pil()
    about = json.loads(bundled.path(f"{name}.json").read_text(encoding="utf-8"))
    height, width = about["tile"]
    with pil.open(bundled.path(f"{name}.webp")) as mosaic:
        pixels = _tensor(mosaic)
    grid = pixels.view(3, -1, height, about["columns"], width).permute(1, 3, 0, 2, 4)
    tiles = grid.reshape(-1, 3, height, width)
    train, test = (torch.tensor(about[split]["labels"]) for split in ("train", "test"))
    parts = ImageSplit(tiles[: len(train)], train), ImageSplit(tiles[len(train) :], test)
    return ImageSet(name, tuple(about["classes"]), *parts)


def _digits() -> ImageSet:
    raw = require("sklearn.datasets", "the image data set 'digits'", "scikit-learn").load_digits()
    gray = (torch.from_numpy(raw.images) * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    whole = ImageSplit(gray[:, None].repeat(1, 3, 1, 1), labels)
    train, test = stratified(labels, 360, 0)
    return ImageSet("digits", tuple("0123456789"), whole.subset(train), whole.subset(test))


def _torchvision(name: str, root: str | Path | None, size: int | None, download: bool) -> ImageSet:
    datasets = require("torchvision.datasets", f"the image data set {name!r}", "torchvision")
    kind = name.removeprefix("torchvision/")
    if kind not in _TORCHVISION:
        raise VisadaptError(f"no torchvision classification data set {kind!r}{nearest(kind, _TORCHVISION)}")
    if root is None:
        raise VisadaptError(f"{name!r} needs root=, the folder of torchvision's data sets")
    parts = []
    for option in _TORCHVISION[kind]:
        try:
            dataset = getattr(datasets, kind)(root=root, download=download, **option)
        except (RuntimeError, OSError) as error:
            hint = "" if download else " (download=True downloads it)"
            raise VisadaptError(f"torchvision could not load {kind} from {root}: {error}{hint}") from error
        samples = (dataset[i] for i in range(len(dataset)))
        parts.append(_stack(((_rgb(image, name), int(label)) for image, label in samples), size, name))
    classes = getattr(dataset, "classes", None) or range(1 + max(int(part.labels.max()) for part in parts))
    return ImageSet(name, tuple(str(c) for c in classes), *parts)


def _folder(path: Path, size: int | None, known: Sequence[str] | None) -> ImageSet:
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise VisadaptError(f"{path} must have a folder 'train' and a folder 'test' or 'val'")
    classes = _class_names(path / "train")
    if not classes:
        raise VisadaptError(f"{path / 'train'} must have one folder per class, got none")
    empty = next((name for name in classes if not _files_below(path / "train" / name)), None)
    if empty is not None and known is None:
        raise VisadaptError(f"{path / 'train' / empty} must have at least one image, got none")
    lacks = "is not in 'train'" if known is None else "is not a class of the task"
    classes = list(known or classes)
    parts = []
    for split in (path / "train", test):
        for name in _class_names(split):
            if name not in classes:
                raise VisadaptError(f"{split}: class {name!r} {lacks}{nearest(name, classes)}")
        parts.append(_stack(_labelled(split, classes), size, str(split)))
    return ImageSet(path.name, tuple(classes), *parts)


def _class_names(split: Path) -> list[str]:
    # hidden folders belong to other programs, such as .ipynb_checkpoints
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(place: str | Path) -> list[Path]:
    """List image files: the file itself, or all image files below a folder, sorted.

    Args:
        place: the file or folder.

    Raises:
        VisadaptError: there is no such file or folder, or no image in it.
    """
    path = Path(place)
    if path.is_file():
        return [path]
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VisadaptError(f"no image or folder {place}{nearest(path.name, siblings)}")
    found = _files_below(path)
    if not found:
        raise VisadaptError(f"{place} must have at least one image, got none")
    return found


def read_images(files: Iterable[str | Path | Image], size: int) -> Tensor:
    """Read images, resize the shorter side to ``size`` pixels and crop the centre square.

    Args:
        files: paths of the images, or images of Pillow.
        size: side of the squares in pixels.

    Returns:
        uint8, ``(N, 3, size, size)``.

    Raises:
        VisadaptError: a file is not a readable image, or ``files`` is empty.
    """
    return _stack(((_opened(file), 0) for file in files), size, "images").images


def _opened(file: str | Path | Image) -> Image:
    if isinstance(file, str | Path):
        return _read(Path(file))
    if not isinstance(file, _pil().Image):
        raise VisadaptError(f"an image must be a path or an image of Pillow, got {type(file).__name__}")
    return _rgb(file, "image")


def _labelled(split: Path, classes: Sequence[str]) -> Iterable[tuple[Image, int]]:
    for label, name in enumerate(classes):
        yield from ((_read(file), label) for file in _files_below(split / name))


def _files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def _read(file: Path) -> Image:
    return _rgb(read_image(file), file)


def _rgb(image: Image, where: str | Path) -> Image:
    """Convert an image to RGB with 8 bits per channel; Pillow alone would clip 16-bit values at 255."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        numpy = require("numpy", "loading 16-bit images", "numpy")
        image = _pil().fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    elif image.mode in ("I", "F"):
        raise VisadaptError(
            f"{where}: 32-bit pixels (mode {image.mode!r}) have no known range: save the image with 16 bits"
        )
    return image.convert("RGB")


def _stack(samples: Iterable[tuple[Image, int]], size: int | None, where: str) -> ImageSplit:
    images: list[Tensor] = []
    labels = []
    for image, label in samples:
        images.append(_tensor(image if size is None else _square(image, size)))
        labels.append(label)
        if images[-1].shape != images[0].shape:
            raise _SizesDifferError(f"{where}: the images differ in size: give size=, such as size=224")
    if not images:
        raise VisadaptError(f"{where} must have at least one image, got none")
    return ImageSplit(torch.stack(images), torch.tensor(labels))


def _square(image: Image, size: int) -> Image:
    """Resize the shorter side to ``size`` and crop the centre."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), _pil().Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resized(split: ImageSplit, size: int) -> ImageSplit:
    pil = _pil()
    images = (pil.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images)
    return _stack(zip(images, split.labels.tolist(), strict=True), size, "images")


def _tensor(image: Image) -> Tensor:
    """Convert an RGB image to uint8, ``(3, H, W)``."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _pil() -> Any:
    return require("PIL.Image", "loading images", "pillow")
