"""What a training was: a line an epoch, and which of them was kept."""

from __future__ import annotations

from dataclasses import dataclass

from visadapt.table import Table


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        number: from 1.
        loss: mean training loss of its steps, while the parameters moved.
        score: the metric on the validation data afterwards; None without such data.
        seconds: it took, validation included; of one that was resumed, what was left of it.
    """

    number: int
    loss: float
    score: float | None
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A finished training; prints as a table.

    Attributes:
        task: that was trained; None for a plain module.
        epochs: all of them, in order.
        metric: name of the score.
        best: number of the epoch whose state was kept: the best by score, the last without validation data.
        steps: optimiser steps taken.
        parameters: number of parameters that were trained.
    """

    task: str | None
    epochs: tuple[Epoch, ...]
    metric: str
    best: int
    steps: int
    parameters: int

    @property
    def score(self) -> float | None:
        """Of the state that was kept, on the validation data."""
        return self.epochs[self.best - 1].score

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return sum(epoch.seconds for epoch in self.epochs)

    def table(self) -> Table:
        """One row an epoch; the one that was kept carries a star."""
        rows = [
            (
                f"{epoch.number}{' *' if epoch.number == self.best else ''}",
                f"{epoch.loss:.4f}",
                "–" if epoch.score is None else f"{epoch.score:.4f}",
                f"{epoch.seconds:.1f}",
            )
            for epoch in self.epochs
        ]
        title = f"{self.task or 'the whole network'}: {self.parameters:,} parameters trained"
        return Table(("epoch", "loss", self.metric, "seconds"), rows, title)

    def __str__(self) -> str:
        return str(self.table())
