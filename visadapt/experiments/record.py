"""Results: one JSON file each in a folder, written whole, so that what was killed goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.typed import from_json

STOPPED = "stopped"
"""The fact that says why a training ended in numbers that are not finite."""


@dataclass(frozen=True)
class Result:
    """One figure: a contender, trained once on a problem, measured in one way.

    Attributes:
        key: short for everything that the figure depends on; results of different experiments share it where they ask
            for the very same figure.
        experiment: that asked for it.
        modality: ``image`` or ``text``.
        network: the backbone's short name, such as ``resnet50``.
        problem: its name.
        contender: its name.
        seed: of the new parts, the order and dropout.
        split: ``test`` or ``validation``.
        metric: what ``score`` is, such as ``accuracy``.
        score: on that split.
        trained: parameters trained beside the head.
        head: parameters of the head.
        backbone: parameters of the backbone without its head.
        seconds: of the training.
        bytes: of the task's file, or of a full copy of the network.
        lr: peak learning rate.
        epochs: of the training.
        facts: the experiment's own coordinates, as JSON values.
        machine: what it was made with: ``device``, versions, commit.
        setting: short for the problem and the contender with all that is behind their names, but for ``lr``. Only
            results of one setting are each other's seeds. None where it is not known, or is that of several problems.
    """

    key: str
    experiment: str
    modality: str
    network: str
    problem: str
    contender: str
    seed: int
    split: str
    metric: str
    score: float
    trained: int
    head: int
    backbone: int
    seconds: float
    bytes: int
    lr: float
    epochs: int
    facts: dict[str, Any] = field(default_factory=dict, hash=False)
    machine: dict[str, str] = field(default_factory=dict, hash=False)
    setting: str | None = None

    @property
    def fraction(self) -> float:
        """What was trained beside the head, over the backbone."""
        return self.trained / self.backbone

    @property
    def diverged(self) -> bool:
        """Whether the training ended in numbers that are not finite; the score is then that of the untrained task."""
        return STOPPED in self.facts

    @property
    def standing(self) -> float:
        """The score that it is chosen by: what diverged loses to anything that did not."""
        return -math.inf if self.diverged else self.score


_FIELDS = {f.name: f for f in dataclasses.fields(Result)}

_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "str | None": lambda text: text or None,
}


def key_of(**facts: Any) -> str:
    """A short name for everything that a result depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """All results in one ``.json`` or ``.csv`` file, or in those of a folder and of the folders in it.

    Args:
        path: of the folder or file.

    Returns:
        The results in the order of experiment, network, problem, contender, split, seed, facts, each once.

    Raises:
        VisadaptError: nothing is there, or a file does not hold results.
    """
    place = Path(path)
    if not place.exists():
        raise VisadaptError(f"no folder or file of results {place}")
    files = [place] if place.is_file() else sorted((*place.rglob("*.csv"), *place.rglob("*.json")))
    found: dict[tuple[str, str], Result] = {}
    for file in files:
        if file.name.startswith("."):  # what a kill left half-written
            continue
        for result in _of_csv(file) if file.suffix == ".csv" else [_of_json(file)]:
            found[result.experiment, result.key] = result
    return sorted(found.values(), key=_order)


def write_csv(results: Iterable[Result], path: str | os.PathLike[str]) -> Path:
    """Writes results as a table, one row each, ``facts`` and ``machine`` as JSON; :func:`read_results` reads it back.

    Args:
        results: any number.
        path: of the file.

    Returns:
        The path.

    Raises:
        VisadaptError: the file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_FIELDS)
        for result in sorted(results, key=_order):
            values = dataclasses.asdict(result).values()
            writer.writerow(json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for value in values)
    return target


class Record:
    """The results in a folder, each in ``<folder>/<experiment>/<key>.json``.

    Args:
        folder: of the results; it need not be there yet.

    Raises:
        VisadaptError: the folder holds files that are no results.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        there = read_results(self.folder) if self.folder.exists() else []
        self._results = {(result.experiment, result.key): result for result in there}
        self._any = {result.key: result for result in there}

    def get(self, experiment: str, key: str) -> Result | None:
        """The result of that key, if it is there."""
        return self._results.get((experiment, key))

    def elsewhere(self, key: str) -> Result | None:
        """The same figure, made for whatever experiment."""
        return self._any.get(key)

    def add(self, result: Result) -> None:
        """Keeps a result, on disk at once."""
        write(result, self.folder)
        self.remember(result)

    def remember(self, result: Result) -> None:
        """Knows of a result that is on disk already."""
        self._results[result.experiment, result.key] = result
        self._any[result.key] = result


def write(result: Result, folder: Path) -> Path:
    """Writes a result to its file: ``<folder>/<experiment>/<key>.json``.

    Raises:
        VisadaptError: the experiment or the key is not a plain name; it would be a path out of the folder.
    """
    for name in (result.experiment, result.key):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise VisadaptError(f"experiment and key must be plain names, got {name!r}")
    target = folder / result.experiment / f"{result.key}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    return target


def _of_json(file: Path) -> Result:
    try:
        return from_json(Result, json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise VisadaptError(f"{file} is no result of an experiment") from error


def _of_csv(file: Path) -> list[Result]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeError, csv.Error) as error:
        raise VisadaptError(f"{file} is no table of results: {error}") from error
    return [_of_row(row, f"{file}, line {number}") for number, row in enumerate(rows, start=2)]


def _of_row(row: dict[str, str], where: str) -> Result:
    try:
        return from_json(Result, {name: _value(_FIELDS[name].type, text) for name, text in row.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise VisadaptError(f"{where} is no result of an experiment") from error


def _value(kind: Any, text: str) -> Any:
    return _FROM_TEXT[kind](text) if kind in _FROM_TEXT else json.loads(text)


def _order(result: Result) -> tuple[Any, ...]:
    facts = json.dumps(result.facts, sort_keys=True)
    return (result.experiment, result.network, result.problem, result.contender, result.split, result.seed, facts)
