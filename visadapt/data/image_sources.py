"""Image data sets by name, by path, or as objects of the ``datasets`` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visadapt.data import bundled
from visadapt.data.datasets_library import is_stored
from visadapt.data.image_datasets import find_in_datasets
from visadapt.data.image_file import pil, to_tensor
from visadapt.data.image_layouts import Found, in_folders, layout_of
from visadapt.data.image_tables import ImageColumns, in_table
from visadapt.data.lazy_images import ImageFiles
from visadapt.data.splits import stratified
from visadapt.data.tables import Format
from visadapt.data.targets import Targets
from visadapt.errors import VisadaptError, check_unused, nearest, option
from visadapt.optional import require
from visadapt.reading import check_file

BUNDLED = ("cifar10", "mnist", "fashion-mnist", "digits")
"""Data sets that come with the package, or with scikit-learn."""

_OF_DATASETS = ("root", "image", "label", "regression", "multi_label")
"""Options that describe the columns of a data set of the ``datasets`` library."""

_OF_TABLES = (*_OF_DATASETS[1:], "header", "delimiter", "encoding")
"""Options that describe a table."""

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


def find(
    data: Any,
    *,
    root: str | Path | None = None,
    download: bool = False,
    classes: Sequence[str] | None = None,
    online: bool = False,
    noted: Mapping[str, Any] | None = None,
    **columns: Any,
) -> Found:
    """Find the labelled images of a data set; see `visadapt.data.load_images`.

    Args:
        data: as `visadapt.data.load_images` takes it.
        root: as there.
        download: as there.
        classes: as there.
        online: as there.
        noted: further options, such as a task's notes, for data that is described by them; other data ignores them.
        **columns: as there.

    Raises:
        VisadaptError: the data set does not exist, its layout is not understood, or an option has no effect on it.
    """
    given = {key: value for key, value in {"root": root, **columns}.items() if value is not None}
    if given.get("regression") is False:
        del given["regression"]
    _check_known(given)

    def reading(options: tuple[str, ...], what: str) -> ImageColumns:
        check_unused((key for key in given if key not in options), what)
        return _columns({key: value for key, value in {**(noted or {}), **given}.items() if key in options})

    name = str(data) if isinstance(data, str | Path) else "the data set"
    if not isinstance(data, str | Path) or name.startswith("hf/"):
        described = reading(_OF_DATASETS, f"{name} is not a table")
        return find_in_datasets(data, name, classes, described, online)
    if name in BUNDLED:
        reading((), f"{name} comes with the package")
        bundled.warn_of_namesake(name)
        return _digits() if name == "digits" else _bundled(name)
    if name.startswith("torchvision/"):
        reading(("root",), f"{name} is a data set of torchvision")
        return _torchvision(name, root, download)
    path = Path(name)
    if not name:
        raise VisadaptError("an image data set must have a name, got ''")
    if not os.path.exists(path):
        check_file(path, "data", "a folder or a table of images")
        known = (*BUNDLED, "torchvision/CIFAR10", *_siblings(path))
        raise VisadaptError(f"no image data set or folder {name!r}{nearest(path.name, known)}")
    if is_stored(path):
        return find_in_datasets(path, path.name, classes, reading(_OF_DATASETS, f"{name} is not a table"))
    layout = layout_of(path)
    if isinstance(layout, Path) and is_stored(layout):
        return find_in_datasets(layout, layout.name, classes, reading(_OF_DATASETS, f"{layout} is not a table"))
    if isinstance(layout, dict):
        reading((), f"{name} is a folder of classes, not a table")
        return in_folders(path, layout, classes)
    return in_table(layout, classes, reading(("root", *_OF_TABLES), name))


def _siblings(path: Path) -> Iterator[str]:
    try:
        yield from (each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    except OSError:
        return


def _check_known(given: Iterable[str]) -> None:
    for name in given:
        if name not in ("root", *_OF_TABLES):
            what = "applies to texts only, and these are images" if name == "text" else "is not an option of image data"
            raise VisadaptError(f"{option(name)} {what}{'' if name == 'text' else nearest(name, _OF_TABLES)}")


def _columns(given: Mapping[str, Any]) -> ImageColumns:
    form = {name: given[name] for name in ("header", "delimiter", "encoding") if name in given}
    places = {name: given[name] for name in ("image", "label") if name in given}
    targets = Targets(bool(given.get("regression")), given.get("multi_label"))
    root = given.get("root")
    return ImageColumns(**places, root=None if root is None else Path(root), form=Format(**form), targets=targets)


def _bundled(name: str) -> Found:
    about = json.loads(bundled.path(f"{name}.json").read_text(encoding="utf-8"))
    height, width = about["tile"]
    with pil().open(bundled.path(f"{name}.webp")) as mosaic:
        pixels = to_tensor(mosaic)
    grid = pixels.view(3, -1, height, about["columns"], width).permute(1, 3, 0, 2, 4)
    tiles = grid.reshape(-1, 3, height, width)
    train, test = (torch.tensor(about[split]["labels"]) for split in ("train", "test"))
    splits = {
        "train": ImageFiles(tiles[: len(train)], train, name=name),
        "test": ImageFiles(tiles[len(train) :], test, name=name),
    }
    return Found(name, tuple(about["classes"]), splits)


def _digits() -> Found:
    raw = require("sklearn.datasets", "the image data set 'digits'", "scikit-learn").load_digits()
    gray = (torch.from_numpy(raw.images) * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    whole = ImageFiles(gray[:, None].repeat(1, 3, 1, 1), labels, name="digits")
    train, test = stratified(labels, 360, 0)
    return Found("digits", tuple("0123456789"), {"train": whole.subset(train), "test": whole.subset(test)})


def _torchvision(name: str, root: str | Path | None, download: bool) -> Found:
    datasets = require("torchvision.datasets", f"the image data set {name!r}", "torchvision")
    kind = name.removeprefix("torchvision/")
    if kind not in _TORCHVISION:
        raise VisadaptError(f"no torchvision classification data set {kind!r}{nearest(kind, _TORCHVISION)}")
    if root is None:
        raise VisadaptError(f"{name!r} needs {option('root')}, the folder of torchvision's data sets")
    splits = {}
    for split, options in zip(("train", "test"), _TORCHVISION[kind], strict=True):
        try:
            dataset = getattr(datasets, kind)(root=root, download=download, **options)
        except (RuntimeError, OSError) as error:
            hint = "" if download else " (download=True downloads it)"
            raise VisadaptError(f"torchvision could not load {kind} from {root}: {error}{hint}") from error
        labels = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
        splits[split] = ImageFiles(_Images(dataset), labels, name=name)
    classes = getattr(dataset, "classes", None) or range(1 + max(int(part.labels.max()) for part in splits.values()))
    return Found(name, tuple(str(c) for c in classes), splits)


class _Images(Sequence[Any]):
    """The images of a data set of torchvision."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][0]
