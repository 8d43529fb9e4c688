"""Images of the ``datasets`` library: objects, folders that ``save_to_disk`` wrote, and names of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visadapt.data.image_layouts import SPLITS, Found, ImageColumns
from visadapt.data.lazy_images import ImageFiles
from visadapt.errors import VisadaptError, nearest, option
from visadapt.optional import require


def is_stored(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))


def find_in_datasets(
    data: Any, name: str, classes: Sequence[str] | None, columns: ImageColumns, online: bool = False
) -> Found:
    """Find the labelled images of a data set of the ``datasets`` library.

    Args:
        data: a ``Dataset``, a ``DatasetDict``, a folder that ``save_to_disk`` wrote, or ``"hf/NAME"``.
        name: for messages.
        classes: names of the labels in their order; None for the data set's own.
        columns: the columns of images and labels.
        online: whether ``"hf/NAME"`` may be downloaded.

    Raises:
        VisadaptError: the data set cannot be loaded, or has no column of images or of labels.
    """
    datasets = require("datasets", f"the image data set {name!r}", "datasets")
    if isinstance(data, Path):
        data = _attempt(name, lambda: datasets.load_from_disk(str(data)))
    elif isinstance(data, str):
        source = data.removeprefix("hf/")
        if not online and not Path(source).is_dir():
            raise VisadaptError(f"{data!r} would be downloaded: allow it with {option('online')}")
        data = _attempt(name, lambda: datasets.load_dataset(source))
    if isinstance(data, datasets.Dataset):
        data = {"train": data}
    if not isinstance(data, dict) or not data:
        raise VisadaptError(f"image data must be a path, a name, a Dataset or a DatasetDict, got {type(data).__name__}")
    known = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}
    parts = {}
    for key, part in data.items():
        if str(key).lower() not in known:
            raise VisadaptError(f"{name}: no split {key!r}{nearest(str(key), known)}")
        parts[known[str(key).lower()]] = part
    first = parts.get("train") or next(iter(parts.values()))
    image, label = _image_column(first, name, columns, datasets), _label_column(first, name, columns)
    names = _class_names(first, label)
    cells = {split: [_cell(value, names) for value in part[label]] for split, part in parts.items()}
    targets = columns.targets
    several = any(isinstance(cell, list) for cell in cells["train" if "train" in cells else next(iter(cells))])
    separator = "\0" if several else targets.separator
    targets = type(targets)(targets.regression, separator)
    written = {
        split: [separator.join(cell) if isinstance(cell, list) and separator else str(cell) for cell in values]
        for split, values in cells.items()
    }
    if classes is None:
        own = written["train" if "train" in written else next(iter(written))]
        targets.check_plausible(own, name)
        classes = names or targets.names(own)
    splits = {
        split: ImageFiles(
            _Column(part.cast_column(image, datasets.Image(decode=False)), image),
            targets.encode(written[split], classes, f"{name}, split {split!r}"),
            name=f"{name}, split {split!r}",
        )
        for split, part in parts.items()
    }
    return Found(name, tuple(classes), splits)


class _Column(Sequence[Any]):
    """A column of a data set, read row by row from disk."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][self.name]


def _attempt(name: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # the library's client raises many types of error
        raise VisadaptError(f"the datasets library cannot load {name!r}: {error}") from error


def _image_column(part: Any, name: str, columns: ImageColumns, datasets: Any) -> str:
    images = [key for key, feature in part.features.items() if isinstance(feature, datasets.Image)]
    wanted = columns.image
    if wanted is not None:
        if wanted not in images:
            raise VisadaptError(f"{name} has no column of images {wanted!r}{nearest(str(wanted), images)}")
        return str(wanted)
    if len(images) != 1:
        got = f"the columns of images {', '.join(map(repr, images))}" if images else "no column of images"
        raise VisadaptError(f"{name} has {got}: choose one with {option('image')}")
    return str(images[0])


def _label_column(part: Any, name: str, columns: ImageColumns) -> str:
    wanted = str(columns.label)
    if wanted not in part.features:
        names = ", ".join(map(repr, part.features))
        raise VisadaptError(f"{name} has the columns {names}: choose the label column with {option('label')}")
    return wanted


def _class_names(part: Any, label: str) -> tuple[str, ...]:
    feature = part.features[label]
    return tuple(getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None) or ())


def _cell(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_cell(one, names) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and names:
        return names[value] if 0 <= value < len(names) else str(value)
    return str(value)
