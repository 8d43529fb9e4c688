"""The history of a training run: one row per epoch, and the epoch whose state was kept."""

from __future__ import annotations

from dataclasses import dataclass

from visadapt.table import Table


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        number: from 1.
        loss: mean training loss over its steps, while the parameters moved.
        score: the metric on the validation data afterwards; None without such data.
        seconds: duration, validation included; of a resumed epoch, of the resumed part only.

    Examples:
        >>> epoch = visadapt.training.Epoch(number=1, loss=0.5, score=0.75, seconds=2.0)
        >>> epoch.score
        0.75
    """

    number: int
    loss: float
    score: float | None
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The result of a training run; prints as a table.

    Attributes:
        task: the trained task; None for a plain module.
        epochs: all epochs, in order.
        metric: name of the score.
        best: number of the epoch whose state was kept: the best by score, or the last without validation data; 0 if no
            epoch scored better than the linear probe that the head started as.
        steps: number of optimiser steps.
        parameters: number of trained parameters.
        head_first: whether the head started as a linear probe, or why not, in words; empty if the recipe does not want
            it.
        start: validation score of that linear probe.

    Examples:
        >>> epochs = (visadapt.training.Epoch(1, 0.5, 0.75, 2.0), visadapt.training.Epoch(2, 0.4, 0.5, 2.0))
        >>> history = visadapt.training.Fit("flowers", epochs, "accuracy", best=1, steps=20, parameters=300)
        >>> history.score, history.seconds
        (0.75, 4.0)
    """

    task: str | None
    epochs: tuple[Epoch, ...]
    metric: str
    best: int
    steps: int
    parameters: int
    head_first: str = ""
    start: float | None = None

    @property
    def score(self) -> float | None:
        """Validation score of the kept state."""
        return self.start if self.best == 0 else self.epochs[self.best - 1].score

    @property
    def seconds(self) -> float:
        """Duration of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)

    def table(self) -> Table:
        """One row per epoch, after that of the linear probe if it was scored; the kept one is starred."""
        rows = [] if self.start is None else [(f"0{' *' if self.best == 0 else ''}", "–", f"{self.start:.4f}", "–")]
        rows += [
            (
                f"{epoch.number}{' *' if epoch.number == self.best else ''}",
                f"{epoch.loss:.4f}",
                "–" if epoch.score is None else f"{epoch.score:.4f}",
                f"{epoch.seconds:.1f}",
            )
            for epoch in self.epochs
        ]
        title = f"{self.task or 'the whole network'}: {self.parameters:,} parameters trained"
        title += f"; head first: {self.head_first}" if self.head_first else ""
        title += "; * is kept" if rows else ""
        return Table(("epoch", "loss", self.metric, "seconds"), rows, title)

    def __str__(self) -> str:
        return str(self.table())
