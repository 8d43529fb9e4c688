"""Logs: what is written after each epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from visadapt import VisadaptError
from visadapt.training import Fit, JsonLines, Recipe, TensorBoard, fit

DATA = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
RECIPE = Recipe(epochs=3)


def test_json_lines_hold_every_epoch_so_far(tmp_path: Path) -> None:
    file, seen = tmp_path / "log.jsonl", []

    def look(history: Fit) -> None:
        seen.append([json.loads(line) for line in file.read_text().splitlines()])

    result = fit(nn.Linear(3, 2), None, DATA, DATA, RECIPE, log=[JsonLines(file), look])
    assert [len(lines) for lines in seen] == [1, 2, 3]
    for line, epoch in zip(seen[-1], result.epochs, strict=True):
        expected = {"task": None, "epoch": epoch.number, "loss": epoch.loss, "metric": "accuracy", "score": epoch.score}
        assert line == {**expected, "seconds": epoch.seconds}
    assert seen[-1][:1] == seen[0]
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(VisadaptError, match=r"no folder '.*nowhere' to write the log log\.jsonl to"):
        JsonLines(tmp_path / "nowhere" / "log.jsonl")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_loss_and_score_over_epochs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(nn.Linear(3, 2), None, DATA, DATA, RECIPE, log=TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, values in (("loss", [e.loss for e in result.epochs]), ("accuracy", [e.score for e in result.epochs])):
        points = events.Scalars(f"model/{name}")
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(values)
