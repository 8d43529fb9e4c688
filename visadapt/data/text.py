"""Text data sets: bundled domains, files and folders of labelled texts, GLUE and TREC as distributed, Hugging Face."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from visadapt.arguments import check_fields, takes
from visadapt.data import bundled
from visadapt.data.datasets_library import SPLITS, open_dataset
from visadapt.data.splits import indices_of, without_samples
from visadapt.data.tables import Column, Format, is_table
from visadapt.data.targets import Targets, check_form, check_range, doubtful, held_out
from visadapt.data.text_rows import Reader, Rows, Text, rows_of_datasets, rows_of_folder
from visadapt.data.text_sources import BUNDLED, PRESETS, at_root, is_stored_set, options_of
from visadapt.errors import VisadaptError, check_unused, nearest, option
from visadapt.reading import check_file

_SENTIMENT = ("negative", "neutral", "positive")


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
        """Return the samples at these indices, in this order.

        Raises:
            VisadaptError: they are not indices of samples.
        """
        index = indices_of(indices, len(self))
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
        for split in (self.train, self.validation, self.test):
            check_range(split.labels, self.classes, self.name)


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
        The data set; labels are in numeric order if all are numbers, in alphabetical order otherwise.

    Raises:
        VisadaptError: the data set, file or column does not exist, a line has too few columns or no label, a split has
            a label that is not one of the classes, or an option has no effect on this data set.

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
        splits = rows_of_folder(Path(root) / name, Reader(preset.text, preset.label, form), every=False)
        if name == "trec":
            splits = {split: rows.relabelled(lambda y: y.split(":")[0]) for split, rows in splits.items()}
        return _assemble(name, splits, seed, Targets(), preset.classes)
    if not name:
        raise VisadaptError("a text data set must have a name, got ''")
    path, reader = at_root(name, root), Reader(text, label, Format(header, delimiter, encoding), targets)
    known = None if classes is None else {y: y for y in classes}
    if not isinstance(name_or_path, str | Path) or name.startswith("hf/") or is_stored_set(path):
        source = path if isinstance(name_or_path, str | Path) and not name.startswith("hf/") else name_or_path
        parts = open_dataset(source, name, online, config)
        splits, targets, own = rows_of_datasets(parts, name, text, label, targets)
        return _completed(name, splits, seed, targets, known or own, whole)
    if os.path.isdir(path):
        return _assemble(path.name, rows_of_folder(path, reader, whole), seed, targets, known, whole=whole)
    if not os.path.isfile(path):
        check_file(path, f"{option('name_or_path')}", "a file or a folder of texts")
        there = [p.name for p in path.parent.iterdir() if is_table(p)] if os.path.isdir(path.parent) else []
        known_names = (*BUNDLED, *PRESETS, "hf/NAME", *there)
        raise VisadaptError(f"no text data set, file or folder {name!r}{nearest(path.name, known_names)}")
    return _completed(path.name, {"train": reader.read(path)}, seed, targets, known, whole, where=str(path))


def _completed(
    name: str,
    splits: dict[str, Rows],
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
    few = without_samples(made.classes, made.train.labels, "rows")
    return replace(made, remarks=(*remarks, *made.remarks, *(f"{name}: {remark}" for remark in few)))


def _bundled(name: str) -> TextSet:
    with gzip.open(bundled.path(f"{name}.tsv.gz"), "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    parts = {}
    for split in SPLITS:
        own = [row for row in rows if row[0] == split]
        parts[split] = Rows([row[3] for row in own], [row[1] for row in own])
    return _assemble(name, parts, 0, Targets(), {c: c for c in _SENTIMENT})


def _assemble(
    name: str,
    splits: Mapping[str, Rows],
    seed: int,
    targets: Targets,
    classes: dict[str, str] | None = None,
    validation: int | None = None,
    whole: bool = False,
) -> TextSet:
    """Build the data set; ``classes`` maps the labels as written to class names, in the order of the class indices."""
    own = splits.get("train") or splits.get("test") or splits["validation"]
    written = targets.names(own.labels)
    remarks: tuple[str, ...] = ()
    if classes is None or ("train" in splits and not set(written) <= set(classes)):
        targets.check_plausible(own.labels, name)
        classes = {y: y for y in written}
        remarks = doubtful(written, name, written=True)
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
    return TextSet(name, tuple(classes.values()), parts["train"], parts["validation"], test, remarks)
