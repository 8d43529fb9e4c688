"""Logs: record the epochs of a training run while it proceeds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.optional import require
from visadapt.reading import check_file
from visadapt.training.history import Fit

Log = Callable[[Fit], None]
"""Called after each epoch with the history so far."""


class JsonLines:
    """Write one line of JSON per epoch: ``task``, ``epoch``, training ``loss``, ``metric``, ``score``, ``seconds``.

    Args:
        path: the file; rewritten atomically after each epoch.

    Raises:
        VisadaptError: the folder does not exist, or there is something else than a file at the path.

    Examples:
        >>> import json
        >>> from pathlib import Path
        >>> log = visadapt.training.JsonLines("log.jsonl")
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> samples = torch.randn(8, 3, 32, 32), torch.randint(3, (8,))
        >>> recipe = Recipe(epochs=2)
        >>> history = visadapt.training.fit(model, "flowers", samples, recipe=recipe, log=[log], progress=False)
        >>> [json.loads(line)["epoch"] for line in Path("log.jsonl").read_text().splitlines()]
        [1, 2]
    """

    @takes()
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isdir(self.path.parent):
            raise VisadaptError(f"no folder {str(self.path.parent)!r} to write the log {self.path.name} to")
        check_file(self.path, "path", "a file for the log")

    def __call__(self, history: Fit) -> None:
        lines = [
            {
                "task": history.task,
                "epoch": epoch.number,
                "loss": epoch.loss,
                "metric": history.metric,
                "score": epoch.score,
                "seconds": epoch.seconds,
            }
            for epoch in history.epochs
        ]
        with replacing(self.path) as file:
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


class TensorBoard:
    """Write training loss and score per epoch as TensorBoard curves.

    Args:
        folder: for TensorBoard's event files.

    Raises:
        VisadaptError: TensorBoard is not installed; the folder cannot be written to.

    Examples:
        >>> log = visadapt.training.TensorBoard("curves")  # fit(..., log=[log]); then: tensorboard --logdir curves
    """

    @takes()
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        for name in ("tensorboard", "torch.utils.tensorboard"):  # the first for its name in the error
            module = require(name, "TensorBoard's log", "visadapt[tensorboard]")
        try:
            self._writer: Any = module.SummaryWriter(str(folder))
        except OSError as error:
            raise VisadaptError(f"cannot write to the folder {folder}: {error.strerror or error}") from error

    def __call__(self, history: Fit) -> None:
        epoch, title = history.epochs[-1], history.task or "model"
        self._writer.add_scalar(f"{title}/loss", epoch.loss, epoch.number)
        if epoch.score is not None:
            self._writer.add_scalar(f"{title}/{history.metric}", epoch.score, epoch.number)
        self._writer.flush()
