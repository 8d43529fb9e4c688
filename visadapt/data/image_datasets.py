"""Images of the ``datasets`` library, read row by row from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visadapt.data.datasets_library import labels_of, open_dataset
from visadapt.data.image_layouts import Found, ImageColumns
from visadapt.data.lazy_images import ImageFiles
from visadapt.errors import VisadaptError, nearest, option
from visadapt.optional import require


def find_in_datasets(
    data: Any, name: str, classes: Sequence[str] | None, columns: ImageColumns, online: bool = False
) -> Found:
    """Find the labelled images of a data set of the ``datasets`` library.

    Args:
        data: as `visadapt.data.datasets_library.open_dataset` takes it.
        name: for messages.
        classes: names of the labels in their order; None for the data set's own.
        columns: the columns of images and labels.
        online: whether ``"hf/NAME"`` may be downloaded.

    Raises:
        VisadaptError: the data set cannot be loaded, or has no column of images or of labels.
    """
    parts = open_dataset(data, name, online)
    datasets = require("datasets", f"the image data set {name!r}", "datasets")
    first = parts.get("train") or next(iter(parts.values()))
    image = _image_column(first, name, columns, datasets)
    labels = labels_of(parts, str(columns.label), columns.targets, name)
    if classes is None:
        own = labels.cells["train" if "train" in labels.cells else next(iter(labels.cells))]
        labels.targets.check_plausible(own, name)
        classes = labels.names or labels.targets.names(own)
    splits = {
        split: ImageFiles(
            _Column(parts[split].cast_column(image, datasets.Image(decode=False)), image),
            labels.targets.encode(cells, classes, f"{name}, split {split!r}"),
            name=f"{name}, split {split!r}",
        )
        for split, cells in labels.cells.items()
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
