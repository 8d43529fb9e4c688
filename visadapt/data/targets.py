"""Labels as tables write them: class names, several per sample, or real values."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from visadapt.data.splits import stratified
from visadapt.errors import VisadaptError, nearest, option

_COMMA = re.compile(r"[-+]?[\d.]*,\d+")
"""A number with a decimal comma."""

_MISSING = frozenset(("nan", "nat", "<na>", "n/a", "null"))
"""How programs write that a value is missing, in lower case."""

_MANY = 20
"""Number of different labels from which the library asks whether they are classes."""


@dataclass(frozen=True)
class Targets:
    """What the labels of a table are.

    Args:
        regression: whether they are real values; otherwise they are names of classes.
        separator: between the labels of one cell, if a sample may have any number of them; None for one label per cell.
    """

    regression: bool = False
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise VisadaptError(f"{option('multi_label')} must be the text between two labels, such as ';', got ''")
        if self.regression and self.separator is not None:
            raise VisadaptError(f"give {option('regression')} or {option('multi_label')}, not both")

    @property
    def problem_type(self) -> str:
        """What they are, as transformers names it."""
        if self.regression:
            return "regression"
        return "single_label_classification" if self.separator is None else "multi_label_classification"

    def names(self, cells: Iterable[str]) -> tuple[str, ...]:
        """Return the class names in cells: in numeric order if all are numbers, alphabetically otherwise."""
        return () if self.regression else tuple(ordered(name for cell in cells for name in self.split(cell)))

    def split(self, cell: str) -> list[str]:
        """Return the labels of one cell."""
        if self.separator is None:
            return [cell]
        return [part.strip() for part in cell.split(self.separator) if part.strip()]

    def encode(self, cells: Sequence[str], classes: Sequence[str], where: str, numbers: Sequence[int] = ()) -> Tensor:
        """Convert cells to numbers.

        Args:
            cells: the labels as written.
            classes: names in the order of the outputs.
            where: for messages.
            numbers: row of each cell in its file, for messages.

        Returns:
            Class indices, int64 ``(N,)``; real values, float32 ``(N,)``; or bool ``(N, C)``, True for every label that
            applies.

        Raises:
            VisadaptError: a cell is not a number, or not one of the classes.
        """
        if self.regression:
            values = [_real(cell) for cell in cells]
            if None in values:
                wrong = values.index(None)
                row = f", row {numbers[wrong]}" if numbers else ""
                hint = ": write a decimal comma as a point" if _COMMA.fullmatch(cells[wrong]) else ""
                raise VisadaptError(f"{where}{row}: the label must be a finite number, got {cells[wrong]!r:.80}{hint}")
            return torch.tensor(values, dtype=torch.float32)
        codes = {name: index for index, name in enumerate(classes)}
        for name in (name for cell in cells for name in self.split(cell)):
            if name not in codes:
                raise VisadaptError(f"{where} has label {name!r}, which is not a class{nearest(name, codes)}")
        if self.separator is None:
            return torch.tensor([codes[cell] for cell in cells], dtype=torch.int64)
        hot = torch.zeros(len(cells), len(codes), dtype=torch.bool)
        for index, cell in enumerate(cells):
            hot[index][[codes[name] for name in self.split(cell)]] = True
        return hot

    def check_plausible(self, cells: Sequence[str], where: str) -> None:
        """Refuse labels that are probably not classes, because nearly every sample has a label of its own.

        Raises:
            VisadaptError: they are real values, or names that do not repeat.
        """
        if self.separator is not None and cells and all(re.fullmatch(r"\[.*\]", cell) for cell in cells):
            raise VisadaptError(
                f"{where}: a cell of several labels must be names with {self.separator!r} between them, got "
                f"{cells[0]!r:.80}: leave out the brackets and the quotation marks"
            )
        if self.regression or self.separator is not None:
            return
        different = len(set(cells))
        if different <= max(2, len(cells) // 2):
            return
        numbers = all(_real(cell) is not None or _COMMA.fullmatch(cell) for cell in set(cells))
        fractions = numbers and any(not re.fullmatch(r"[-+]?\d+", cell) for cell in set(cells))
        if different < _MANY and not fractions:
            return
        if numbers:
            raise VisadaptError(
                f"{where} has {different} different numbers as labels, such as {cells[0]}: give {option('regression')} "
                "to train on real values"
            )
        raise VisadaptError(
            f"{where} has {different} different labels for {len(cells)} samples, such as {cells[0][:40]!r}: choose the "
            f"label column with {option('label')}, or give {option('multi_label')} for several labels per cell"
        )


def problem_type(labels: Tensor) -> str:
    """What labels of any of the forms of `Targets.encode` are, as transformers names it."""
    if labels.is_floating_point():
        return "regression"
    return "single_label_classification" if labels.ndim == 1 else "multi_label_classification"


def ordered(labels: Iterable[str]) -> list[str]:
    """Sort distinct labels: as numbers if all are numbers such as 7 or 7.0, alphabetically otherwise."""
    distinct = sorted(set(labels))
    # of two spellings of one number, such as 7 and 07, the alphabet tells which comes first
    return sorted(distinct, key=Decimal) if all(re.fullmatch(r"-?\d+(\.\d+)?", y) for y in distinct) else distinct


def doubtful(classes: Sequence[str], where: str, written: bool = False) -> tuple[str, ...]:
    """Describe class names that are probably a mistake, for the user to know.

    Args:
        classes: the names.
        where: what holds them.
        written: whether they are cells of a table, where a missing value may stand as a word.
    """
    alike: dict[str, str] = {}
    said = []
    for name in classes:
        other = alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            said.append(f"classes {other!r} and {name!r} differ only in case, spaces or the composition of letters")
        if written and name.lower() in _MISSING:
            said.append(f"the label {name!r} is taken as a class: remove the rows if it stands for a missing value")
    return tuple(f"{where}: {each}" for each in said[:3])


def check_form(labels: Tensor, count: int) -> None:
    """Refuse labels that have none of the forms of `Targets.encode`.

    Raises:
        VisadaptError: the message names the forms.
    """
    dims = 2 if labels.dtype == torch.bool else 1
    known = labels.dtype in (torch.int64, torch.bool) or labels.is_floating_point()
    if not known or labels.ndim != dims or len(labels) != count:
        shape, dtype = tuple(labels.shape), labels.dtype
        raise VisadaptError(
            f"labels must be int64 of shape ({count},), got {dtype} of {shape}; or real values of that shape, or bool "
            f"of ({count}, classes) for several labels per sample"
        )


def check_range(labels: Tensor, classes: Sequence[str], where: str) -> None:
    """Refuse class indices that are out of range.

    Raises:
        VisadaptError: the message names the data set.
    """
    if labels.dtype == torch.int64 and labels.numel():
        first, last = int(labels.min()), int(labels.max())
        if not 0 <= first <= last < len(classes):
            raise VisadaptError(f"{where}: labels must be from 0 to {len(classes) - 1}, got {first} to {last}")


def held_out(labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``n`` samples at random: with the class proportions of the whole if the labels are classes.

    Args:
        labels: of any of the forms of `Targets.encode`.
        n: how many to choose, between 1 and ``N - 1``.
        seed: the same seed chooses the same samples.

    Returns:
        The remaining and the chosen indices, each in ascending order.
    """
    # as one class, samples are chosen regardless of their labels
    return stratified(labels if labels.dtype == torch.int64 else torch.zeros(len(labels), dtype=torch.int64), n, seed)


def _real(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
