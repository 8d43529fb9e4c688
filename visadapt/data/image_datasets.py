"""Images of the ``datasets`` library, read row by row from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visadapt.data.datasets_library import labels_of, open_dataset, split_of
from visadapt.data.image_layouts import Found
from visadapt.data.image_tables import ImageColumns, existing, text_columns_of, usual_of
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
    if list(parts) == ["train"] and "split" in parts["train"].column_names:
        whole = parts["train"]
        members = [split_of(str(cell), f"{name}, row {row}") for row, cell in enumerate(whole["split"])]
        parts = {
            split: whole.select([i for i, m in enumerate(members) if m == split]) for split in dict.fromkeys(members)
        }
    first = parts.get("train") or next(iter(parts.values()))
    image = _image_column(first, name, columns, datasets)
    labels = labels_of(parts, str(columns.label), columns.targets, name)
    if classes is None:
        own = labels.cells["train" if "train" in labels.cells else next(iter(labels.cells))]
        labels.targets.check_plausible(own, name)
        classes = labels.names or labels.targets.names(own)
    named = isinstance(first.features[image], datasets.Value)
    root = columns.root or (data.parent if isinstance(data, Path) else Path())

    def items(split: str) -> Sequence[Any]:
        part = parts[split]
        if named:
            return existing(root, list(part[image]), f"{name}, split {split!r}", range(len(part)))
        return _Column(part.cast_column(image, datasets.Image(decode=False)), image)

    splits = {
        split: ImageFiles(
            items(split),
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
    """The column of images, or else that of the names of image files."""
    images = [key for key, feature in part.features.items() if isinstance(feature, datasets.Image)]
    texts = text_columns_of(part)
    wanted = columns.image
    if wanted is not None:
        if wanted not in (*images, *texts):
            raise VisadaptError(f"{name} has no column of images {wanted!r}{nearest(str(wanted), [*images, *texts])}")
        return str(wanted)
    if not images:
        usual = usual_of(texts)
        images = [] if usual is None else [usual]
    if len(images) != 1:
        of_images = ", ".join(map(repr, images))
        got = f"the columns of images {of_images}" if images else f"the columns {', '.join(map(repr, part.features))}"
        raise VisadaptError(f"{name} has {got}: choose the column of images or of their files with {option('image')}")
    return str(images[0])
