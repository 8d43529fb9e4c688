"""Logs: where a training's epochs are written down while it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.optional import require
from visadapt.training.history import Fit

Log = Callable[[Fit], None]
"""Called after each epoch with all of them so far."""


class JsonLines:
    """A line of JSON an epoch: ``task``, ``epoch``, training ``loss``, ``metric``, ``score`` and ``seconds``.

    Args:
        path: of the file, which is replaced as a whole each time.

    Raises:
        VisadaptError: there is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise VisadaptError(f"no folder {self.path.parent} to write a log in")

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
    """Training loss and score as curves of TensorBoard, over the epochs.

    Args:
        folder: for TensorBoard's files.

    Raises:
        VisadaptError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        module = require("torch.utils.tensorboard", "TensorBoard's log", "visadapt[tensorboard]")
        self._writer: Any = module.SummaryWriter(str(folder))

    def __call__(self, history: Fit) -> None:
        epoch, title = history.epochs[-1], history.task or "model"
        self._writer.add_scalar(f"{title}/loss", epoch.loss, epoch.number)
        if epoch.score is not None:
            self._writer.add_scalar(f"{title}/{history.metric}", epoch.score, epoch.number)
        self._writer.flush()
