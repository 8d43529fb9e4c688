"""Results: one line of JSON each, appended as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visadapt.errors import VisadaptError


@dataclass(frozen=True)
class Result:
    """One contender, trained once.

    Attributes:
        key: of everything that the figures depend on.
        problem: its name.
        contender: its name.
        seed: of the new parts, the order and dropout.
        split: ``test`` or ``validation``.
        accuracy: on that split.
        trained: parameters trained beside the head.
        head: parameters of the head.
        backbone: parameters of the backbone without its head.
        seconds: of the training.
        bytes: of the task's file, or of a full copy of the network.
        lr: peak learning rate.
        epochs: of the training.
    """

    key: str
    problem: str
    contender: str
    seed: int
    split: str
    accuracy: float
    trained: int
    head: int
    backbone: int
    seconds: float
    bytes: int
    lr: float
    epochs: int

    @property
    def fraction(self) -> float:
        """What was trained beside the head, over the backbone."""
        return self.trained / self.backbone


def key_of(**facts: Any) -> str:
    """A short name for everything that a result depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Record:
    """The results in a file, by key.

    Args:
        path: of the file; None keeps them in memory only.

    Raises:
        VisadaptError: the file is there but does not hold results.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.results: dict[str, Result] = {}
        if self.path is not None and self.path.is_file():
            for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    result = Result(**json.loads(line))
                except (TypeError, ValueError) as error:
                    raise VisadaptError(f"{self.path}, line {number} is no result of an experiment") from error
                self.results[result.key] = result

    def add(self, result: Result) -> None:
        """Keeps a result, on disk at once."""
        self.results[result.key] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
