"""Data sets of the ``datasets`` library: objects, stored folders, JSON and Parquet files, and names of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visadapt.data.targets import Targets
from visadapt.errors import VisadaptError, nearest, option
from visadapt.optional import require
from visadapt.reading import check_readable

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of the splits of folders, files and data sets, in lower case."""

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".arrow": "arrow"}
"""The library's builder for a file, by suffix."""


def split_of(name: str, where: str) -> str:
    """Return the split that a cell or a key names, in any case.

    Raises:
        VisadaptError: no split has this name.
    """
    known = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}
    if name.lower() not in known:
        raise VisadaptError(f"{where}: no split {name!r}{nearest(name, known)}")
    return known[name.lower()]


def is_stored(path: Path) -> bool:
    """Whether a path is a folder that ``save_to_disk`` wrote, or a file that the library reads."""
    if path.suffix.lower() in _BUILDERS:
        return os.path.isfile(path)
    return any(os.path.isfile(path / file) for file in ("dataset_dict.json", "state.json"))


def holds_data_files(folder: Path) -> bool:
    """Whether a folder has JSON or Parquet files that the library reads."""
    return os.path.isdir(folder) and any(
        file.suffix.lower() in _BUILDERS for file in folder.iterdir() if file.is_file()
    )


def open_dataset(data: Any, name: str, online: bool = False, config: str | None = None) -> dict[str, Any]:
    """Open a data set of the ``datasets`` library.

    Args:
        data: a ``Dataset``, a ``DatasetDict``, a path for which `is_stored` holds, or ``"hf/NAME"``: a folder or file
            of this machine, or a data set of the Hugging Face hub.
        name: for messages.
        online: whether a data set of the hub may be downloaded.
        config: configuration of a data set of the hub.

    Returns:
        A ``Dataset`` per split, by ``train``, ``validation`` and ``test``.

    Raises:
        VisadaptError: the data set cannot be loaded, would be downloaded, or has a split of another name.
    """
    datasets = require("datasets", f"the data set {name!r}", "datasets")
    if isinstance(data, str):
        source = data.removeprefix("hf/")
        data = Path(source)
        if not os.path.exists(data):
            if not online:
                raise VisadaptError(f"{name!r} would be downloaded: allow it with {option('online')}")
            data = _attempt(name, lambda: datasets.load_dataset(source, config))
    if isinstance(data, Path):
        data = _attempt(name, lambda path=data: _read(path, datasets, config))
    if isinstance(data, datasets.Dataset):
        data = {"train": data}
    if not isinstance(data, dict) or not data:
        raise VisadaptError(f"data must be a path, a name, a Dataset or a DatasetDict, got {type(data).__name__}")
    parts: dict[str, Any] = {}
    for key, part in data.items():
        split = split_of(str(key), name)
        if split in parts:
            raise VisadaptError(f"{name} has two splits for {split}, of which one is {key!r}")
        parts[split] = part
    return parts


def _read(path: Path, datasets: Any, config: str | None) -> Any:
    check_readable(path)
    if os.path.isdir(path) and is_stored(path):
        return datasets.load_from_disk(str(path))
    builder = _BUILDERS.get(path.suffix.lower())
    if os.path.isfile(path) and builder is not None:
        return datasets.load_dataset(builder, data_files=str(path))
    return datasets.load_dataset(str(path), config)


def _attempt(name: str, load: Any) -> Any:
    try:
        return load()
    except VisadaptError:
        raise
    except Exception as error:  # the library and its client raise many types of error
        # where a file is wrong, only the cause says how
        cause = error.__cause__ or error
        raise VisadaptError(f"the datasets library cannot load {name!r}: {cause}") from error


@dataclass(frozen=True)
class Labels:
    """A column of labels, as a table would write it.

    Attributes:
        cells: per split.
        names: of the classes, in the order that the data set gives them; empty if it gives none.
        targets: how a cell is read.
    """

    cells: dict[str, list[str]]
    names: tuple[str, ...]
    targets: Targets


def labels_of(parts: dict[str, Any], column: str, targets: Targets, name: str) -> Labels:
    """Read the labels of a data set; splits whose labels are hidden (all -1, or none) are left out.

    Args:
        parts: a ``Dataset`` per split.
        column: of the labels.
        targets: what the labels are.
        name: for messages.

    Raises:
        VisadaptError: a label is missing.
    """
    names: tuple[str, ...] = ()
    values: dict[str, list[Any]] = {}
    for split, part in parts.items():
        if column not in part.features:
            known = ", ".join(map(repr, part.features))
            raise VisadaptError(f"{name} has the columns {known}: choose the label column with {option('label')}")
        feature = part.features[column]
        names = names or tuple(getattr(feature, "names", None) or getattr(_inner(feature), "names", None) or ())
        cells = list(part[column])
        if cells and all(cell is None or cell == -1 for cell in cells):
            continue
        values[split] = cells
    several = any(isinstance(cell, list) for cells in values.values() for cell in cells)
    separator = "\0" if several else targets.separator
    written: dict[str, list[str]] = {}
    for split, cells in values.items():
        for row, cell in enumerate(cells):
            if cell is None or cell == "" or (cell == -1 and names):
                if separator is not None and cell != -1:
                    cells[row] = ""
                    continue
                raise VisadaptError(f"{name}, split {split!r}, row {row}: the label is empty")
        written[split] = [_written(cell, names, separator) for cell in cells]
    return Labels(written, names, replace(targets, separator=separator))


def _inner(feature: Any) -> Any:
    """The feature of a list's elements."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)


def _written(cell: Any, names: Sequence[str], separator: str | None) -> str:
    if isinstance(cell, list):
        return (separator or "").join(_written(one, names, None) for one in cell)
    if isinstance(cell, int) and not isinstance(cell, bool) and names:
        return names[cell] if 0 <= cell < len(names) else str(cell)
    return str(cell)
