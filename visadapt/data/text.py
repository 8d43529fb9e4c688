"""Text data sets: bundled domains, files and folders of labelled texts, GLUE and TREC as distributed, Hugging Face."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visadapt.arguments import check_fields, takes
from visadapt.data import bundled
from visadapt.data.datasets_library import SPLITS, labels_of, open_dataset
from visadapt.data.tables import SUFFIXES, Column, Format, Table, is_table, read_table
from visadapt.data.targets import Targets, check_form, held_out
from visadapt.data.text_sources import BUNDLED, PRESETS, at_root, is_stored_set, options_of
from visadapt.errors import VisadaptError, check_unused, nearest, option
from visadapt.reading import check_file

Text = str | tuple[str, str]

_SENTIMENT = ("negative", "neutral", "positive")

TEXT_COLUMNS = ("text", "sentence", ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts with their labels.

    Args:
        texts: one string per sample, or a pair of strings.
        labels: class indices, int64 ``(N,)``; real values, float ``(N,)``; or bool ``(N, C)``, True for every label
            that applies.

    Examples:
        >>> from visadapt.data import TextSplit
        >>> TextSplit(["a rose", "a lily"], torch.tensor([0, 1])).subset([1]).texts
        ['a lily']
    """

    texts: list[Text]
    labels: Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        check_form(self.labels, len(self.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Tensor | Sequence[int]) -> TextSplit:
        """Return the samples at these indices, in this order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return TextSplit([self.texts[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True, eq=False)
class TextSet:
    """A text data set.

    Args:
        name: the name it was loaded by.
        classes: the name of each label; empty for real values.
        train: training split.
        validation: validation split, to choose settings by.
        test: test split.
        remarks: what the library decided, for the user to know.

    Examples:
        >>> from visadapt.data import load_text
        >>> load_text("tweets").classes
        ('negative', 'neutral', 'positive')
    """

    name: str
    classes: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    test: TextSplit
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@takes()
def load_text(
    name_or_path: Any,
    *,
    root: str | Path | None = None,
    text: Column | Sequence[Column] | None = None,
    label: Column = "label",
    header: bool = True,
    delimiter: str | None = None,
    encoding: str = "utf-8-sig",
    config: str | None = None,
    classes: Sequence[str] | None = None,
    whole: bool = False,
    seed: int = 0,
    regression: bool = False,
    multi_label: str | None = None,
    online: bool = False,
) -> TextSet:
    """Load a text data set into memory.

    A data set without a labelled test split uses its validation split as test split; a missing validation split is
    10 % of train, chosen by ``seed`` with the same class proportions.

    Args:
        name_or_path: one of
            ``"tweets"``, ``"movies"``, ``"products"``, ``"editorials"``: bundled domains with human sentiment labels
            (negative, neutral, positive);
            ``"sst2"``, ``"cola"``, ``"mrpc"``, ``"rte"``, ``"trec"``: the folder of this name in ``root``;
            a ``.jsonl``, ``.json`` or ``.parquet`` file, or a folder of such files; a folder that ``save_to_disk`` of
            the ``datasets`` library wrote, or its ``Dataset`` or ``DatasetDict``;
            ``"hf/NAME"``: another folder that this library loads, or a data set of the Hugging Face hub;
            a folder with ``train`` and ``test`` and/or ``dev`` (``validation``) files, ``.tsv`` or ``.csv``;
            a ``.tsv`` or ``.csv`` file (``.gz`` too), of which 10 % become validation and 20 % test.
        root: folder that contains the GLUE and TREC folders, or that a relative path starts from.
        text: text column, or two for pairs, as names or as numbers from 0; None looks for the usual names.
        label: label column.
        header: whether the first line holds the column names; otherwise columns are numbered.
        delimiter: column separator; None for a comma in ``.csv`` and a tab in other files. Quotes in a ``.csv`` are
            quotes; so they are in other files if they all open and close a cell.
        encoding: encoding of the files.
        config: configuration of a Hugging Face data set, such as ``"sst2"`` of ``"hf/glue"``.
        classes: class names, if the training split need not have all of them; None to take those of train.
        whole: make no splits: all rows of a file, or of the test file of a folder, go to the test split; the other two
            are empty.
        seed: seed of splits that the data set does not define.
        regression: whether labels are real values.
        multi_label: the text between the labels of one cell, if a sample may have any number of them.
        online: whether ``"hf/NAME"`` may be downloaded.

    Returns:
        The data set; labels are in numeric order if all are integers, in alphabetical order otherwise.

    Raises:
        VisadaptError: there is no such data set, file or column, a line has too few columns or no label, a split has a
            label that is not one of the classes, or an option has no effect on this data set.

    Examples:
        >>> import os
        >>> from pathlib import Path
        >>> from visadapt.data import load_text
        >>> rows = ["text,label", *(f"review {i},{i % 2}" for i in range(20))]
        >>> size = Path("reviews.csv").write_text(os.linesep.join(rows))
        >>> reviews = load_text("reviews.csv")
        >>> len(reviews.train), len(reviews.validation), len(reviews.test), reviews.classes
        (14, 2, 4, ('0', '1'))
    """
    name = str(name_or_path) if isinstance(name_or_path, str | Path) else "the data set"
    given = {"root": root, "text": text, "delimiter": delimiter, "multi_label": multi_label, "config": config}
    changed = {"label": label != "label", "header": not header, "encoding": encoding != "utf-8-sig"}
    used = {key for key, value in given.items() if value is not None} | {key for key, value in changed.items() if value}
    taken, what = options_of(name_or_path, root)
    check_unused(sorted((used | ({"regression"} if regression else set())) - taken), what)
    if name in BUNDLED:
        bundled.warn_of_namesake(name)
        return _bundled(name)
    targets = Targets(regression, multi_label)
    if name in PRESETS:
        if root is None:
            raise VisadaptError(f"{name!r} needs {option('root')}, the folder that contains the folder {name!r}")
        preset = PRESETS[name]
        form = Format(preset.header, preset.delimiter, preset.encoding)
        splits = _folder(Path(root) / name, _Reader(preset.text, preset.label, form))
        if name == "trec":
            splits = {split: rows.relabelled(lambda y: y.split(":")[0]) for split, rows in splits.items()}
        return _assemble(name, splits, seed, Targets(), preset.classes)
    path, reader = at_root(name, root), _Reader(text, label, Format(header, delimiter, encoding), targets)
    known = None if classes is None else {y: y for y in classes}
    if not isinstance(name_or_path, str | Path) or name.startswith("hf/") or is_stored_set(path):
        source = path if isinstance(name_or_path, str | Path) and not name.startswith("hf/") else name_or_path
        parts = open_dataset(source, name, online, config)
        splits, targets, own = _of_datasets(parts, name, text, label, targets)
        return _completed(name, splits, seed, targets, known or own, whole)
    if os.path.isdir(path):
        return _assemble(path.name, _folder(path, reader, whole), seed, targets, known, whole=whole)
    if not os.path.isfile(path):
        check_file(path, f"{option('name_or_path')}", "a file or a folder of texts")
        there = [p.name for p in path.parent.iterdir() if is_table(p)] if os.path.isdir(path.parent) else []
        known_names = (*BUNDLED, *PRESETS, "hf/NAME", *there)
        raise VisadaptError(f"no text data set, file or folder {name!r}{nearest(path.name, known_names)}")
    return _completed(path.name, {"train": reader.read(path)}, seed, targets, known, whole, where=str(path))


def _completed(
    name: str,
    splits: dict[str, _Rows],
    seed: int,
    targets: Targets,
    known: dict[str, str] | None,
    whole: bool,
    where: str | None = None,
) -> TextSet:
    """Build the data set of these splits; of a single one, 20 % become the test split and 10 % validation."""
    if whole:
        last = next(split for split in ("test", "validation", "train") if split in splits)
        return _assemble(name, {"test": splits[last]}, seed, targets, known, whole=True)
    if "train" not in splits:
        raise VisadaptError(f"{name} must have a train split, got {', '.join(splits)}")
    if len(splits) > 1:
        return _assemble(name, splits, seed, targets, known)
    rows, where = splits["train"], where or name
    if len(rows) < 10:
        raise VisadaptError(
            f"{where}: must have at least 10 rows to split into train, validation and test, got {len(rows)}"
        )
    targets.check_plausible(rows.labels, where)
    codes = targets.encode(rows.labels, targets.names(rows.labels), where, rows.numbers)
    left, test = held_out(codes, len(rows) // 5, seed)
    parts = {"train": rows.subset(left.tolist()), "test": rows.subset(test.tolist())}
    made = _assemble(name, parts, seed, targets, known, validation=len(rows) // 10)
    remarks = [f"{name}: {len(made.test)} of {len(rows)} rows held out for test"]
    remarks.append(f"{name}: {len(made.validation)} of {len(rows) - len(made.test)} rows held out for validation")
    return replace(made, remarks=tuple(remarks))


@takes()
def read_texts(file: Path, text: Column | Sequence[Column] | None = None, form: Format | None = None) -> list[Text]:
    """Read the texts of a table, or the pairs of texts, without labels.

    Args:
        file: ``.tsv`` or ``.csv``, perhaps with ``.gz``.
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
    table = read_table(file, form or Format())
    return _texts(table, text_columns(table, text))


@dataclass(frozen=True)
class _Rows:
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

    def subset(self, rows: Sequence[int]) -> _Rows:
        numbers = [self.numbers[i] for i in rows] if self.numbers else []
        return _Rows([self.texts[i] for i in rows], [self.labels[i] for i in rows], numbers)

    def relabelled(self, change: Any) -> _Rows:
        return _Rows(self.texts, [change(label) for label in self.labels], self.numbers)


@dataclass(frozen=True)
class _Reader:
    """Reads files with one layout of columns."""

    text: Column | Sequence[Column] | None
    label: Column
    form: Format
    targets: Targets = field(default_factory=Targets)

    def read(self, file: Path) -> _Rows:
        """Return the rows of a file: text or pair, and label."""
        table = read_table(file, self.form)
        texts, label = text_columns(table, self.text), table.column(self.label)
        labels = table.cells(label)
        for number, cell in zip(table.numbers, labels, strict=True):
            if not cell and self.targets.separator is None:
                raise VisadaptError(f"{file}, row {number}: the label is empty")
        return _Rows(_texts(table, texts), labels, table.numbers)


def text_columns(table: Table, wanted: Column | Sequence[Column] | None) -> tuple[int, ...]:
    """Find the text column, or the two columns of pairs.

    Raises:
        VisadaptError: there is none of the usual name, or not the one that is wanted.
    """
    if wanted is None:
        for usual in TEXT_COLUMNS:
            columns = (usual,) if isinstance(usual, str) else usual
            if table.names is not None and set(columns) <= set(table.names):
                return tuple(table.column(c) for c in columns)
        raise VisadaptError(
            f"{table.file} has {table.described()}: choose the text column with {option('text')} (two for pairs)"
        )
    chosen = (wanted,) if isinstance(wanted, str | int) else tuple(wanted)
    if len(chosen) not in (1, 2):
        raise VisadaptError(f"{option('text')} must be one column or a pair, got {len(chosen)} columns")
    return tuple(table.column(c) for c in chosen)


def _texts(table: Table, columns: Sequence[int]) -> list[Text]:
    sides = [table.cells(column) for column in columns]
    return list(sides[0]) if len(sides) == 1 else list(zip(sides[0], sides[1], strict=True))


def _bundled(name: str) -> TextSet:
    with gzip.open(bundled.path(f"{name}.tsv.gz"), "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    parts = {}
    for split in SPLITS:
        own = [row for row in rows if row[0] == split]
        parts[split] = _Rows([row[3] for row in own], [row[1] for row in own])
    return _assemble(name, parts, 0, Targets(), {c: c for c in _SENTIMENT})


def _folder(path: Path, reader: _Reader, whole: bool = False) -> dict[str, _Rows]:
    found = {}
    files = {file.name.lower(): file for file in sorted(path.iterdir()) if file.is_file()} if path.is_dir() else {}
    for split, stems in SPLITS.items():
        file = next((files[s + e] for s in stems for e in SUFFIXES if s + e in files), None)
        if file is not None:
            found[split] = reader.read(file)
    if (whole and found) or ("train" in found and len(found) > 1):
        return found
    raise VisadaptError(f"{path} must have a file 'train' and a file 'test' or 'dev' (.tsv or .csv) of texts")


def _of_datasets(
    parts: dict[str, Any], name: str, text: Column | Sequence[Column] | None, label: Column, targets: Targets
) -> tuple[dict[str, _Rows], Targets, dict[str, str] | None]:
    """The rows per split of a data set of the ``datasets`` library, how its labels are read, and its classes."""
    first = next(iter(parts.values()))
    # its header only: the rows are read by column
    table = Table(Path(name), tuple(first.column_names), [], [])
    columns = [first.column_names[index] for index in text_columns(table, text)]
    labels = labels_of(parts, first.column_names[table.column(label)], targets, name)
    splits: dict[str, _Rows] = {}
    for split, cells in labels.cells.items():
        sides = [list(parts[split][column]) for column in columns]
        for column, side in zip(columns, sides, strict=True):
            wrong = next((row for row, cell in enumerate(side) if not isinstance(cell, str)), None)
            if wrong is not None:
                got = type(side[wrong]).__name__
                raise VisadaptError(f"{name}, split {split!r}, row {wrong}: {column!r} must be a text, got {got}")
        splits[split] = _Rows(sides[0] if len(sides) == 1 else list(zip(*sides, strict=True)), cells)
    if not splits:
        raise VisadaptError(f"{name} must have labels, got hidden ones only")
    return splits, labels.targets, {y: y for y in labels.names} or None


def _assemble(
    name: str,
    splits: Mapping[str, _Rows],
    seed: int,
    targets: Targets,
    classes: dict[str, str] | None = None,
    validation: int | None = None,
    whole: bool = False,
) -> TextSet:
    """Build the data set; ``classes`` maps the labels as written to class names, in the order of the class indices."""
    own = splits.get("train") or splits.get("test") or splits["validation"]
    written = targets.names(own.labels)
    if classes is None or ("train" in splits and not set(written) <= set(classes)):
        targets.check_plausible(own.labels, name)
        classes = {y: y for y in written}
    parts = {}
    for split, rows in splits.items():
        labels = targets.encode(rows.labels, tuple(classes), f"{name}: split {split!r}", rows.numbers)
        parts[split] = TextSplit(rows.texts, labels)
    test = parts["test"] if "test" in parts else parts.pop("validation", parts.get("train"))
    assert test is not None
    if whole:
        empty = test.subset([])
        return TextSet(name, tuple(classes.values()), empty, empty, test)
    if "validation" not in parts:
        left, chosen = held_out(parts["train"].labels, validation or max(1, len(parts["train"]) // 10), seed)
        parts["train"], parts["validation"] = parts["train"].subset(left), parts["train"].subset(chosen)
    return TextSet(name, tuple(classes.values()), parts["train"], parts["validation"], test)
