"""Rows of labelled texts: from tables, folders of tables, and data sets of the ``datasets`` library."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visadapt.arguments import takes
from visadapt.data.datasets_library import SPLITS, is_stored, labels_of, open_dataset
from visadapt.data.tables import SUFFIXES, Column, Format, Table, is_table, read_table
from visadapt.data.targets import Targets
from visadapt.errors import VisadaptError, option

Text = str | tuple[str, str]

TEXT_COLUMNS = ("text", "sentence", ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))


@dataclass(frozen=True)
class Rows:
    """Texts with their labels as written.

    Args:
        texts: strings or pairs.
        labels: one cell per text.
        numbers: of the rows in their file; empty if unknown.
    """

    texts: list[Text]
    labels: list[str]
    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: Sequence[int]) -> Rows:
        numbers = [self.numbers[i] for i in rows] if self.numbers else []
        return Rows([self.texts[i] for i in rows], [self.labels[i] for i in rows], numbers)

    def relabelled(self, change: Any) -> Rows:
        return Rows(self.texts, [change(label) for label in self.labels], self.numbers)


@dataclass(frozen=True)
class Reader:
    """Reads files with one layout of columns."""

    text: Column | Sequence[Column] | None
    label: Column
    form: Format
    targets: Targets = field(default_factory=Targets)

    def read(self, file: Path) -> Rows:
        """Return the rows of a file: text or pair, and label."""
        table = read_table(file, self.form)
        usual = table.usual(("label",)) if self.label == "label" else None
        texts, label = text_columns(table, self.text), table.column(self.label) if usual is None else usual
        labels = table.cells(label)
        for number, cell in zip(table.numbers, labels, strict=True):
            if not cell and self.targets.separator is None:
                raise VisadaptError(f"{file}, row {number}: the label is empty")
        return Rows(_texts(table, texts), labels, table.numbers)


def text_columns(table: Table, wanted: Column | Sequence[Column] | None) -> tuple[int, ...]:
    """Find the text column, or the two columns of pairs.

    Raises:
        VisadaptError: there is none of the usual name, or not the one that is wanted.
    """
    if wanted is None:
        for usual in TEXT_COLUMNS:
            places = [table.usual((name,)) for name in ((usual,) if isinstance(usual, str) else usual)]
            if None not in places:
                return tuple(place for place in places if place is not None)
        raise VisadaptError(
            f"{table.file} has {table.described()}: choose the text column with {option('text')} (two for pairs)"
        )
    chosen = (wanted,) if isinstance(wanted, str | int) else tuple(wanted)
    if len(chosen) not in (1, 2):
        raise VisadaptError(f"{option('text')} must be one column or a pair, got {len(chosen)} columns")
    return tuple(table.column(c) for c in chosen)


def _texts(table: Table, columns: Sequence[int]) -> list[Text]:
    sides = [table.cells(column) for column in columns]
    empty = [number for number, *cells in zip(table.numbers, *sides, strict=True) if not all(cells)]
    if empty:
        said = f"{table.file}: {len(empty)} of {len(table.rows)} texts are empty, such as that of row {empty[0]}"
        warnings.warn(said, stacklevel=4)
    return list(sides[0]) if len(sides) == 1 else list(zip(sides[0], sides[1], strict=True))


def rows_of_folder(path: Path, reader: Reader, whole: bool = False, every: bool = True) -> dict[str, Rows]:
    """Read the tables of a folder, one per split.

    Args:
        path: the folder.
        reader: of its tables.
        whole: whether one split is enough.
        every: whether to warn of tables that are none of the splits.

    Raises:
        VisadaptError: there is no training split, no other one, or more than one file for a split.
    """
    found = {}
    files = {file.name.lower(): file for file in sorted(path.iterdir()) if file.is_file()} if path.is_dir() else {}
    others = {file.name for file in files.values() if is_table(file) and file.suffix.lower() != ".txt"}
    for split, stems in SPLITS.items():
        own = [files[s + e] for s in stems for e in SUFFIXES if s + e in files]
        if len(own) > 1:
            raise VisadaptError(f"{path} has two files for {split}, {own[0].name!r} and {own[1].name!r}")
        if own:
            others.discard(own[0].name)
            found[split] = reader.read(own[0])
    if found and others and every:
        warnings.warn(f"{path}: {min(others)!r} is none of the splits and is not used", stacklevel=4)
    if (whole and found) or ("train" in found and len(found) > 1):
        return found
    hint = f": did you mean {path / min(others)}?" if len(others) == 1 and not found else ""
    raise VisadaptError(f"{path} must have a file 'train' and a file 'test' or 'dev' (.tsv or .csv) of texts{hint}")


def _header_of(part: Any, name: str) -> Table:
    """The columns of a ``Dataset``, without its rows, which are read by column."""
    return Table(Path(name), tuple(part.column_names), [], [])


def _columns_of(part: Any, text: Column | Sequence[Column] | None, name: str) -> list[str]:
    return [part.column_names[index] for index in text_columns(_header_of(part, name), text)]


def _texts_of(part: Any, columns: Sequence[str], name: str) -> list[Text]:
    sides = [list(part[column]) for column in columns]
    for column, side in zip(columns, sides, strict=True):
        wrong = next((row for row, cell in enumerate(side) if not isinstance(cell, str)), None)
        if wrong is not None:
            got = type(side[wrong]).__name__
            hint = ": a JSON file must hold one record per row" if got == "list" and len(side) == 1 else ""
            raise VisadaptError(f"{name}, row {wrong}: {column!r} must be a text, got {got}{hint}")
    return sides[0] if len(sides) == 1 else list(zip(*sides, strict=True))


def rows_of_datasets(
    parts: dict[str, Any], name: str, text: Column | Sequence[Column] | None, label: Column, targets: Targets
) -> tuple[dict[str, Rows], Targets, dict[str, str] | None]:
    """The rows per split of a data set of the ``datasets`` library, how its labels are read, and its classes."""
    first = next(iter(parts.values()))
    columns = _columns_of(first, text, name)
    labels = labels_of(parts, first.column_names[_header_of(first, name).column(label)], targets, name)
    splits = {
        split: Rows(_texts_of(parts[split], columns, f"{name}, split {split!r}"), cells)
        for split, cells in labels.cells.items()
    }
    if not splits:
        raise VisadaptError(f"{name} must have labels, got hidden ones only")
    return splits, labels.targets, {y: y for y in labels.names} or None


@takes()
def read_texts(file: Path, text: Column | Sequence[Column] | None = None, form: Format | None = None) -> list[Text]:
    """Read the texts of a table, or the pairs of texts, without labels.

    Args:
        file: ``.tsv`` or ``.csv``, perhaps with ``.gz``; a ``.jsonl``, ``.json``, ``.parquet`` or ``.arrow`` file; or a
            folder that ``save_to_disk`` of the ``datasets`` library wrote, of which all splits are read.
        text: text column, or two for pairs; None looks for the usual names.
        form: how the table is written.

    Returns:
        A string per row, or a pair of strings.

    Raises:
        VisadaptError: the file cannot be read, or has no such column.

    Examples:
        >>> import os
        >>> from pathlib import Path
        >>> from visadapt.data import read_texts
        >>> size = Path("reviews.csv").write_text(os.linesep.join(["text,stars", "a rose,5"]))
        >>> read_texts(Path("reviews.csv"))
        ['a rose']
    """
    if is_stored(file):
        parts = open_dataset(file, str(file))
        columns = _columns_of(next(iter(parts.values())), text, str(file))
        return [each for split, part in parts.items() for each in _texts_of(part, columns, f"{file}, split {split!r}")]
    table = read_table(file, form or Format())
    return _texts(table, text_columns(table, text))
