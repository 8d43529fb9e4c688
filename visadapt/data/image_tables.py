"""Tables of image files and their labels."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from visadapt.data.datasets_library import SPLITS, is_stored, open_dataset, split_of
from visadapt.data.image_layouts import Found
from visadapt.data.lazy_images import ImageFiles
from visadapt.data.tables import Column, Format, Table, read_table
from visadapt.data.targets import Targets, doubtful
from visadapt.errors import VisadaptError, nearest, option

FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_path", "path", "filepath")
"""Usual names of the column of file names, in lower case."""


@dataclass(frozen=True)
class ImageColumns:
    """How a table names images and their labels.

    Args:
        image: column of the file names; None looks for the usual names.
        label: column of the labels.
        root: folder of the images; None for that of the table.
        form: how the table is written.
        targets: what its labels are.
    """

    image: Column | None = None
    label: Column = "label"
    root: Path | None = None
    form: Format = field(default_factory=Format)
    targets: Targets = field(default_factory=Targets)


def in_table(file: Path, known: Sequence[str] | None, columns: ImageColumns) -> Found:
    """Find the images that a table names.

    Args:
        file: the table.
        known: classes of the task in their order; None for those of the training images.
        columns: how the table names images and labels.

    Raises:
        VisadaptError: the table has no such column, a label is empty, or an image does not exist.
    """
    table = read_table(file, columns.form)
    root = columns.root or file.parent
    _check_header(table, root)
    cells = table.cells(_file_column(table, columns.image))
    labels = table.cells(_label_column(table, columns.label))
    files = existing(root, cells, str(file), table.numbers)
    if columns.targets.separator is None and (
        empty := [n for n, y in zip(table.numbers, labels, strict=True) if not y]
    ):
        raise VisadaptError(f"{file}, row {empty[0]}: the label is empty")
    members = _members(table)
    columns.targets.check_plausible(labels, str(file))
    own = [i for i in range(len(files)) if members[i] == "train"] or range(len(files))
    classes = tuple(known) if known is not None else columns.targets.names(labels[i] for i in own)
    parts: dict[str, ImageFiles] = {}
    for split in SPLITS:
        rows = [i for i, member in enumerate(members) if member == split]
        if rows:
            numbers = [table.numbers[i] for i in rows]
            encoded = columns.targets.encode([labels[i] for i in rows], classes, str(file), numbers)
            parts[split] = ImageFiles([files[i] for i in rows], encoded, name=str(file))
    remarks = [] if columns.targets.separator else _repeated(file.name, cells, labels)
    if known is None:
        remarks += doubtful(classes, file.name, written=True)
    return Found(file.stem, classes, parts, tuple(remarks))


def named_images(file: Path, image: Column | None, root: Path | None, form: Format) -> list[Path]:
    """List the image files that a table names, whatever else it holds.

    Args:
        file: the table.
        image: column of the file names; None looks for the usual names.
        root: folder of the images; None for that of the table.
        form: how the table is written.

    Raises:
        VisadaptError: the table cannot be read or has no such column, or an image does not exist.
    """
    root = root or file.parent
    if is_stored(file):
        return [path for part in open_dataset(file, str(file)).values() for path in files_of(part, image, root, file)]
    table = read_table(file, form)
    _check_header(table, root)
    return existing(root, table.cells(_file_column(table, image)), str(file), table.numbers)


def files_of(part: Any, image: Column | None, root: Path, file: Path) -> list[Path]:
    """List the image files that a column of texts of a ``Dataset`` names.

    Raises:
        VisadaptError: the column or an image does not exist.
    """
    texts = text_columns_of(part)
    chosen = usual_of(texts) if image is None else image
    if chosen not in texts:
        found = nearest(str(image or "file"), texts)
        raise VisadaptError(f"{file} has no column of file names{found} (choose it with {option('image')})")
    return existing(root, list(part[chosen]), str(file), range(len(part)))


def text_columns_of(part: Any) -> list[str]:
    """Return the columns of texts of a ``Dataset``."""
    return [key for key, feature in part.features.items() if getattr(feature, "dtype", None) == "string"]


def usual_of(texts: Sequence[str]) -> str | None:
    """Return the column with the most usual name for file names, in any case; None if no column has one."""
    return next((key for name in FILE_COLUMNS for key in texts if key.lower() == name), None)


def _check_header(table: Table, root: Path) -> None:
    first = next((name for name in table.names or () if os.path.isfile(root / name)), None)
    if first is not None:
        hint = f"{option('header')} says whether it does"
        raise VisadaptError(f"{table.file}: the first row must hold the column names, got {first!r} ({hint})")


def _repeated(name: str, cells: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Describe rows that name an image again, for the user to know."""
    first: dict[str, str] = {}
    again = [(cell, label) for cell, label in zip(cells, labels, strict=True) if first.setdefault(cell, label) != label]
    if again:
        return [f"{name}: {len(again)} rows name an image again with another label, such as {again[0][0]!r}"]
    copies = len(cells) - len(first)
    said = "rows name an image again: one copy may be trained on and another one held out"
    return [f"{name}: {copies} {said}"] if copies else []


def _file_column(table: Table, wanted: Column | None) -> int:
    column = table.usual(FILE_COLUMNS) if wanted is None else table.column(wanted)
    if column is None:
        raise VisadaptError(
            f"{table.file} has {table.described()}: choose the column of file names with {option('image')}"
        )
    return column


def _label_column(table: Table, wanted: Column) -> int:
    column = table.usual(("label",)) if wanted == "label" else table.column(wanted)
    if column is None:
        raise VisadaptError(f"{table.file} has {table.described()}: choose the label column with {option('label')}")
    return column


def _members(table: Table) -> list[str]:
    """The split of each row: as a column ``split`` has it, or all training images."""
    column = table.usual(("split",))
    if column is None:
        return ["train"] * len(table.rows)
    return [
        split_of(cell, f"{table.file}, row {n}") for n, cell in zip(table.numbers, table.cells(column), strict=True)
    ]


def existing(root: Path, cells: Sequence[str], where: str, numbers: Sequence[int]) -> list[Path]:
    """Return the files that a column names.

    Args:
        root: folder that the names start from.
        cells: the names as written; a ``\\`` separates folders as on Windows, unless the name has one.
        where: what holds the column, for messages.
        numbers: of the rows.

    Raises:
        VisadaptError: a name is empty, or its file does not exist.
    """
    for number, cell in zip(numbers, cells, strict=True):
        if not cell:
            raise VisadaptError(f"{where}, row {number}: the file name is empty")
    files, absent = [], []
    for cell in cells:
        path = root / cell
        # of a name that is too long, pathlib would raise
        if not os.path.isfile(path) and "\\" in cell:
            path = root / cell.replace("\\", "/")
        files.append(path)
        if not os.path.isfile(path):
            absent.append((path, cell))
    if absent:
        path, cell = absent[0]
        raise VisadaptError(
            f"{where}: {len(absent)} of {len(files)} images do not exist, such as {str(path)[:200]}"
            f"{_hint(root, path, cell)}"
        )
    return files


def _hint(root: Path, path: Path, cell: str) -> str:
    """What is probably the matter with a file name, as the end of a message."""
    if re.match(r"[A-Za-z][\w+.-]*://", cell):
        return ": download the images, and name their files"
    if os.path.isdir(path):
        return ", which is a folder"
    if os.name == "posix" and PureWindowsPath(cell).drive:
        return f": give names without a drive, and {option('root')}, the folder that they start from"
    near = [root.parent, *(folder for folder in (root.iterdir() if os.path.isdir(root) else ()) if folder.is_dir())]
    start = next((folder for folder in sorted(near) if os.path.isfile(folder / cell)), None)
    if start is not None:
        return f": give {option('root')}, the folder that the names start from, such as {start}"
    siblings = [each.name for each in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    if any(Path(name).stem == path.name for name in siblings):
        return f"{nearest(path.name, siblings)} (a file name must have its suffix)"
    return f"{nearest(path.name, siblings)} ({option('root')} is the folder that the names start from)"
