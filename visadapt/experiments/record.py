"""Results: one JSON file each, written atomically, so that an interrupted experiment resumes."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visadapt.arguments import check_fields, takes
from visadapt.bounded_json import parse_json
from visadapt.errors import VisadaptError
from visadapt.experiments.result_check import check_facts, check_values
from visadapt.files import make_folder, replacing
from visadapt.reading import check_file, read_json, read_whole
from visadapt.typed import from_json

KEPT = "kept"
"""Fact of a contender that is validated: the number of the epoch whose state was kept, 0 for the linear probe."""

STOPPED = "stopped"
"""Name of the fact with the reason why a training run ended in numbers that are not finite."""


@dataclass(frozen=True)
class Result:
    """One measurement of a contender that was trained once on a problem.

    Attributes:
        key: hash of everything that the score depends on; different experiments that need the same measurement share
            the key.
        experiment: name of the experiment.
        modality: ``image`` or ``text``.
        network: short name of the backbone, such as ``resnet50``.
        problem: name of the problem.
        contender: name of the contender.
        seed: seed of the new parameters, the order of samples and dropout.
        split: ``test`` or ``validation``.
        metric: name of the metric, such as ``accuracy``.
        score: value of the metric on that split.
        trained: number of trained parameters, without the head.
        head: number of parameters of the head.
        backbone: number of parameters of the backbone, without its head.
        seconds: duration of the training run.
        bytes: size of the task file.
        lr: peak learning rate.
        epochs: epochs of the training run.
        facts: the experiment's own coordinates, as JSON values.
        machine: environment that it was computed in: ``device``, versions, commit.
        setting: hash of the full definition of problem and contender, without ``lr``. Results with the same names but
            different settings cannot be averaged over seeds. None if unknown, or if the result covers several problems.
        regime: name of the sizes, epochs and precision of a collection of experiments; results of two regimes are never
            in one report. None if they have none.
        samples: number of samples that it was measured on; None if unknown.

    Examples:
        >>> from visadapt.experiments import Result
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "bytes": 12_000}
        >>> result = Result("key", "compare", "image", "resnet18", "digits", "bottleneck m=8", 0, "test",
        ...                 metric="accuracy", score=0.91, seconds=9, lr=1e-3, epochs=3, facts={}, machine={}, **sizes)
        >>> result.contender, result.score
        ('bottleneck m=8', 0.91)
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
    regime: str | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_values(self)

    @property
    def fraction(self) -> float:
        """Trained parameters without the head, as a fraction of the backbone's."""
        return self.trained / self.backbone

    @property
    def diverged(self) -> bool:
        """Whether training ended in numbers that are not finite; the score is then that of the untrained task."""
        return STOPPED in self.facts

    @property
    def is_probe(self) -> bool:
        """Whether no epoch was better on validation data than the linear probe that the head started as."""
        return self.facts.get(KEPT) == 0

    @property
    def standing(self) -> float:
        """The score for choosing the best of several results: minus infinity for one that diverged."""
        return -math.inf if self.diverged else self.score


_FIELDS = {f.name: f for f in dataclasses.fields(Result)}

_FORMULA = re.compile("'*[=+@-]")

_REQUIRED = [
    name
    for name, each in _FIELDS.items()
    if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
]

_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "int | None": lambda text: int(text) if text else None,
    "float": float,
    "str": lambda text: _read_cell(text),
    "str | None": lambda text: _read_cell(text) or None,
}


def key_of(**facts: Any) -> str:
    """Hash everything that a result depends on; the order of the facts does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@takes()
def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read all results in a ``.json`` or ``.csv`` file, or in a folder and its subfolders.

    Args:
        path: path of the folder or file.

    Returns:
        The results without duplicates, ordered by experiment, network, problem, contender, split, seed, facts.

    Raises:
        VisadaptError: the path does not exist, or a file does not contain results.

    Examples:
        >>> from pathlib import Path
        >>> from visadapt.experiments import read_results
        >>> Path("results").mkdir()
        >>> read_results("results")
        []
    """
    source = Path(path)
    if not os.path.exists(source):
        raise VisadaptError(f"no folder or file of results {str(source)!r}")
    if not os.path.isdir(source):
        check_file(source, "path", "a folder or a file of results")
    found = [source] if os.path.isfile(source) else sorted((*source.rglob("*.csv"), *source.rglob("*.json")))
    # not a named pipe, which would be waited for
    files = [file for file in found if file.is_file()]
    results: dict[tuple[str, str], Result] = {}
    for file in files:
        if file.name.startswith("."):  # partial file of an interrupted write
            continue
        for result in _read_csv(file) if file.suffix == ".csv" else [_read_json(file)]:
            results[result.experiment, result.key] = result
    return sorted(results.values(), key=_order)


@takes()
def write_csv(results: Iterable[Result], path: str | os.PathLike[str]) -> Path:
    """Write results as a CSV table, one row each, ``facts`` and ``machine`` as JSON; `read_results` reads it.

    Args:
        results: any number of results.
        path: path of the file.

    Returns:
        The path.

    Raises:
        VisadaptError: the file cannot be written.

    Examples:
        >>> from visadapt.experiments import Result, read_results, write_csv
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{seed}", "compare", "image", "resnet18", "digits", "lora r=4", seed, "test",
        ...                   metric="accuracy", score=0.91, lr=1e-3, epochs=3, **sizes) for seed in (0, 1)]
        >>> path = write_csv(results, "results.csv")
        >>> read_results(path) == results
        True
    """
    try:
        rows = list(results)
    except Exception as error:  # of a stranger's class
        raise VisadaptError(f"results must be results of experiments, got {type(results).__name__}") from error
    other = next((row for row in rows if not isinstance(row, Result)), None)
    if other is not None:
        raise VisadaptError(f"results must be results of experiments, got {type(other).__name__}")
    target = Path(path)
    make_folder(target.parent)
    with replacing(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_FIELDS)
        for result in sorted(rows, key=_order):
            values = dataclasses.asdict(result).values()
            writer.writerow(map(_cell, values))
    return target


def _cell(value: Any) -> Any:
    """A value as a cell; of text that a spreadsheet would compute, an apostrophe is put before it."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _read_cell(text: str) -> str:
    return text[1:] if text[:1] == "'" and _FORMULA.match(text) else text


class Record:
    """The results in a folder, each in ``<folder>/<experiment>/<key>.json``.

    Args:
        folder: folder of the results; it may not exist yet.

    Raises:
        VisadaptError: a ``.json`` or ``.csv`` file in the folder does not contain results.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        results = read_results(self.folder) if os.path.exists(self.folder) else []
        self._by_experiment = {(result.experiment, result.key): result for result in results}
        self._by_key = {result.key: result for result in results}

    def get(self, experiment: str, key: str) -> Result | None:
        """Return an experiment's result of this key, or None."""
        return self._by_experiment.get((experiment, key))

    def find(self, key: str) -> Result | None:
        """Return the result of this key from any experiment, or None."""
        return self._by_key.get(key)

    @property
    def results(self) -> list[Result]:
        """All results of all experiments."""
        return list(self._by_experiment.values())

    def add(self, result: Result) -> None:
        """Write a result to disk and remember it."""
        write(result, self.folder)
        self.remember(result)

    def remember(self, result: Result) -> None:
        """Remember a result that is already on disk."""
        self._by_experiment[result.experiment, result.key] = result
        self._by_key[result.key] = result


def write(result: Result, folder: Path) -> Path:
    """Write a result to ``<folder>/<experiment>/<key>.json`` and return that path.

    Raises:
        VisadaptError: the experiment or the key is not a plain name, and could lead out of the folder.
    """
    for name in (result.experiment, result.key):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise VisadaptError(f"experiment and key must be plain names, got {name!r}")
    target = folder / result.experiment / f"{result.key}.json"
    make_folder(target.parent)
    with replacing(target) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    return target


def _read_json(file: Path) -> Result:
    try:
        result = from_json(Result, read_json(file))
        check_facts(result)
    except (TypeError, ValueError) as error:
        raise VisadaptError(f"{file} is not a result of an experiment: {error}") from error
    return result


def _read_csv(file: Path) -> list[Result]:
    try:
        header, *rows = list(csv.reader(io.StringIO(read_whole(file).decode(), newline=""))) or [[]]
        unknown = next((name for name in header if name not in _FIELDS), None)
        lacking = next((name for name in _REQUIRED if name not in header), None)
        if unknown is not None or lacking is not None or len(set(header)) < len(header):
            odd = f"it lacks {lacking!r}" if unknown is None else f"it has {unknown!r:.60}"
            raise ValueError(f"its first row must have the fields of results, each once; {odd}")
    except (ValueError, csv.Error) as error:
        raise VisadaptError(f"{file} is not a table of results: {error}") from error
    return [_from_row(header, row, f"{file}, line {number}") for number, row in enumerate(rows, start=2) if row]


def _from_row(header: list[str], row: list[str], where: str) -> Result:
    try:
        if len(row) != len(header):
            raise ValueError(f"it must have {len(header)} cells, got {len(row)}")
        cells = zip(header, row, strict=True)
        result = from_json(Result, {name: _value(_FIELDS[name].type, text) for name, text in cells})
        check_facts(result)
    except (TypeError, ValueError) as error:
        raise VisadaptError(f"{where} is not a result of an experiment: {error}") from error
    return result


def _value(kind: Any, text: str) -> Any:
    return _FROM_TEXT[kind](text) if kind in _FROM_TEXT else parse_json(text)


def _order(result: Result) -> tuple[Any, ...]:
    facts = json.dumps(result.facts, sort_keys=True)
    return (result.experiment, result.network, result.problem, result.contender, result.split, result.seed, facts)
