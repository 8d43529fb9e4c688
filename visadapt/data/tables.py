"""Tables of text files: their rows and columns, read without guessing."""

from __future__ import annotations

import csv
import io
import re
import sys
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visadapt.data.bounded import read_gzip
from visadapt.errors import VisadaptError, nearest, option
from visadapt.reading import read_whole

Column = str | int

_FIELD_SIZE = threading.Lock()
"""Held while the limit of the whole process is another, so that two threads put back what was there before both."""

SUFFIXES = (".tsv", ".csv", ".txt", ".tab", ".tsv.gz", ".csv.gz")
"""Suffixes of tables, in lower case."""

_SEPARATORS = (";", "\t", "|", ",")

ARCHIVES = (".7z", ".bz2", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")

OTHERWISE = (
    ".xlsx", ".xlsm", ".xls", ".ods", ".numbers", ".docx", ".pdf", ".feather", ".orc", ".avro", ".pkl", ".pickle",
    ".npy", ".npz", ".h5", ".hdf5", ".dta", ".sav", *ARCHIVES,
)  # fmt: skip
"""Suffixes of files that may hold a table, but not as text."""

_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
"""Byte order marks; a mark that begins with another stands before it."""


@dataclass(frozen=True)
class Format:
    """How the files are written.

    Args:
        header: whether the first row holds the column names; otherwise columns are numbered.
        delimiter: column separator; None for a comma in ``.csv`` files and a tab in others.
        encoding: of the characters; a byte order mark of UTF-16 is obeyed.
    """

    header: bool = True
    delimiter: str | None = None
    encoding: str = "utf-8-sig"

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise VisadaptError(f"{option('delimiter')} must be one character, got {self.delimiter!r}")
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise VisadaptError(f"{option('encoding')} must be an encoding of Python, got {self.encoding!r}") from error


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Args:
        file: where they were read.
        names: of the columns; None without a header.
        rows: cells as written.
        numbers: of each row in the file, from 1.
    """

    file: Path
    names: tuple[str, ...] | None
    rows: list[list[str]]
    numbers: list[int]

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.rows[0]) if self.names is None else len(self.names)

    def column(self, wanted: Column) -> int:
        """Find a column by its name, or by its number from 0.

        Raises:
            VisadaptError: the column does not exist.
        """
        if isinstance(wanted, str):
            if self.names is not None and wanted in self.names:
                if self.names.count(wanted) > 1:
                    raise VisadaptError(f"{self.file} has several columns {wanted!r}: choose one by its number from 0")
                return self.names.index(wanted)
            if not re.fullmatch(r"\d{1,6}", wanted):
                if self.names is None:
                    raise VisadaptError(f"column {wanted!r} must be a number, since {self.file} has no header")
                raise VisadaptError(f"no column {wanted!r} in {self.file}{nearest(wanted, self.names)}")
        number = int(wanted)
        if number < 0:
            raise VisadaptError(f"a column number must be at least 0, got {number}")
        if number >= self.width:
            raise VisadaptError(
                f"{self.file}, row {self.numbers[0]} must have {number + 1} columns, got {self.width} "
                f"(columns are numbered from 0)"
            )
        return number

    def usual(self, names: Sequence[str]) -> int | None:
        """Find the column of the first of these names, in any case; None if there is none.

        Args:
            names: in lower case.

        Raises:
            VisadaptError: several columns have the name.
        """
        own = [name.lower() for name in self.names or ()]
        wanted = next((name for name in names if name in own), None)
        if wanted is None:
            return None
        if own.count(wanted) > 1:
            raise VisadaptError(f"{self.file} has several columns {wanted!r}: choose one by its number from 0")
        return own.index(wanted)

    def described(self) -> str:
        """Describe the columns, for messages."""
        if self.names is None:
            return f"{self.width} columns without names"
        if len(self.names) == 1 and _is_separated(self.names[0]):
            return _one_column(self.names[0])
        more = f", … ({len(self.names)})" if len(self.names) > 12 else ""
        return f"the columns {', '.join(f'{name!r:.80}' for name in self.names[:12])}{more}"

    def cells(self, column: int) -> list[str]:
        """The cells of a column, without spaces around them."""
        return [row[column].strip() for row in self.rows]


def _is_separated(line: str) -> bool:
    return any(mark in line for mark in _SEPARATORS)


def _one_column(line: str) -> str:
    return f"one column, {line.strip()!r:.200} ({option('delimiter')} sets its separator)"


def is_table(path: Path) -> bool:
    """Whether a file name is that of a table."""
    return path.name.lower().endswith(SUFFIXES)


def read_table(file: Path, form: Format) -> Table:
    """Read a table.

    In a file whose quotation marks all open and close a cell, as pandas and spreadsheets write them, they are quotes;
    in other tab-separated files, such as GLUE's, they are ordinary characters.

    Args:
        file: ``.csv`` or ``.tsv``, perhaps with ``.gz``.
        form: how it is written.

    Raises:
        VisadaptError: the file cannot be read or decoded, has no rows, or has rows of different lengths.
    """
    if file.suffix.lower() in OTHERWISE:
        raise VisadaptError(f"{file} must be a table as text: save it as .csv")
    if file.name.lower().endswith((".json.gz", ".jsonl.gz", ".ndjson.gz")):
        raise VisadaptError(f"{file} must be unpacked first: only .csv and .tsv are read compressed")
    lines = read_text(file, form.encoding)
    comma = file.name.lower().removesuffix(".gz").endswith(".csv")
    delimiter = form.delimiter or ("," if comma else "\t")
    first, _, rest = lines.partition("\n")
    marked = re.fullmatch(r"sep=(.)", first.strip('\r"')) if comma else None
    if marked:
        # the line that Excel reads the separator from
        delimiter, lines = form.delimiter or marked[1], f"\n{rest}"
        first = rest.partition("\n")[0]
    separated = delimiter not in first and _is_separated(first)
    try:
        rows = _parsed(lines, delimiter, file, quoted_only=comma)
    except VisadaptError as error:
        if not separated:
            raise
        raise VisadaptError(f"{file} has {_one_column(first)}") from error
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if row]
    names = tuple(name.strip() for name in numbered.pop(0)[1]) if form.header and numbered else None
    if not numbered:
        raise VisadaptError(f"{file} has no rows")
    width = len(names) if names is not None else len(numbered[0][1])
    for number, row in numbered:
        if len(row) != width and (len(row) < width or any(cell.strip() for cell in row[width:])):
            if separated:
                raise VisadaptError(f"{file} has {_one_column(first)}")
            hint = "" if len(row) < width else f" ({delimiter!r} in a cell must be inside quotation marks)"
            if names is not None and len(names) == 1:
                hint = f" (the first row must hold the column names, got {names[0]!r:.80})"
            raise VisadaptError(f"{file}, row {number} must have {width} columns, got {len(row)}{hint}")
    return Table(file, names, [row[:width] for _, row in numbered], [number for number, _ in numbered])


def read_text(file: Path, encoding: str) -> str:
    """Read and decode a file, perhaps compressed.

    Raises:
        VisadaptError: the file cannot be read, or a byte is not of the encoding; its place is named.
    """
    try:
        content = read_gzip(file) if file.suffix.lower() == ".gz" else read_whole(file)
    except (OSError, EOFError, zlib.error) as error:
        raise VisadaptError(f"cannot read {file} as {encoding} text: {error}") from error
    if encoding in ("utf-8", "utf-8-sig"):
        encoding = next((marked for mark, marked in _MARKS.items() if content.startswith(mark)), encoding)
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise UnicodeError(f"row {text.count(chr(10), 0, text.index(chr(0))) + 1} has a zero character, as UTF-16 "
                               f"without a mark would have: give the encoding with {option('encoding')}")  # fmt: skip
        return text
    except UnicodeDecodeError as error:
        # a codec that skips a byte order mark counts from behind it
        offset = error.start + len(content) - len(error.object)
        row = content.count(b"\n", 0, offset) + 1
        raise VisadaptError(
            f"cannot read {file} as {encoding} text: byte 0x{content[offset]:02x} at offset {offset}, in row {row} "
            f"({error.reason}); give the file's encoding with {option('encoding')}, such as latin-1"
        ) from error
    except (UnicodeError, LookupError) as error:
        raise VisadaptError(f"cannot read {file} as {encoding} text: {error}") from error


def _parsed(text: str, delimiter: str, file: Path, quoted_only: bool) -> list[list[str]]:
    if delimiter == " ":  # a label, then a text that may contain spaces
        return [line.rstrip("\r").split(" ", 1) for line in text.split("\n") if line]
    with _FIELD_SIZE:
        longest = csv.field_size_limit(sys.maxsize)
        try:
            return _strictly_quoted(text, delimiter, file, quoted_only)
        finally:
            csv.field_size_limit(longest)


def _strictly_quoted(text: str, delimiter: str, file: Path, quoted_only: bool) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        rows.extend(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True))
        if quoted_only or len({len(row) for row in rows if row}) <= 1:
            return rows
    except csv.Error as error:
        if quoted_only:
            row = len(rows) + 1
            raise VisadaptError(
                f"{file}, row {row}: {error}; a cell with a quotation mark must be quoted, with the mark doubled"
            ) from error
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE))
