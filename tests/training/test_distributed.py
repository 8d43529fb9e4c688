"""Several processes, as ``torchrun`` and ``accelerate launch`` start them, train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import visadapt
from tests.models import ZOO
from visadapt import VisadaptError
from visadapt.data import load_images, normalize
from visadapt.training import JsonLines, Recipe, evaluate, fit, predict
from visadapt.training.engine import Engine

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(epochs=2, lr=1e-2, head_lr=3e-2, batch_size=32, head_first=False)


def injected(seed: int = 0, norms: str = "affine") -> nn.Module:
    backbone = ZOO["tiny/resnet"].make()
    torch.manual_seed(seed)
    visadapt.inject(backbone, m=8, task="digits", num_classes=10, norms=norms)
    return visadapt.inject(backbone, m=4, task="other", num_classes=3)


def job(folder: Path) -> dict[str, Any]:
    """Results to compare; the last batches, of 11 and 1 samples, cannot be split evenly."""
    rank = int(os.environ.get("RANK", 0))
    digits = load_images("digits", size=16)
    train, validation = digits.train.subset(range(75)), digits.test.subset(range(33))
    # each process draws other adapters; those of the first are used
    model = injected(seed=rank)
    log = JsonLines(folder / f"log{rank}.jsonl")
    result = fit(model, "digits", train, validation, RECIPE, metric="loss", accumulate=2, log=log)
    results: dict[str, Any] = {"epochs": [(e.loss, e.score) for e in result.epochs], "best": result.best}
    results["evaluated"] = evaluate(model, "digits", validation, ("accuracy", "loss"))
    loader = DataLoader(TensorDataset(normalize(train.images), train.labels), batch_size=32)
    results["loaded"] = fit(model, "digits", loader, recipe=RECIPE.replace(epochs=1)).epochs[0].loss
    every = DataLoader(TensorDataset(normalize(validation.images), validation.labels), batch_size=10)
    results["evaluated loader"] = evaluate(model, "digits", every, ("accuracy", "loss"))
    assert all(p.requires_grad for p in visadapt.parameters(model, "other"))
    logits = predict(model, "digits", validation.images)
    tensors = {name: p.detach().clone() for name, p in visadapt.named_parameters(model, "digits")} | {"logits": logits}
    save_file(tensors, folder / f"rank{rank}.safetensors")
    return results


def stopped_and_resumed(folder: Path) -> None:
    """Each process has its own dropout, and the task owns running statistics."""
    digits = load_images("digits", size=16)
    train, rank = digits.train.subset(range(75)), int(os.environ["RANK"])
    states = []
    for stop, file in ((0, None), (5, folder / "digits.checkpoint"), (0, folder / "digits.checkpoint")):
        torch.manual_seed(0)
        method = visadapt.Bottleneck(8, dropout=0.5)
        model = visadapt.inject(ZOO["tiny/resnet"].make(), method, task="digits", num_classes=10, norms="full")
        left = stop

        def prepare(batch: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return normalize(batch)

        try:
            options: dict[str, Any] = {"checkpoint": file, "checkpoint_every": 1} if file else {}
            fit(model, "digits", train, recipe=RECIPE, prepare=prepare, **options)
        except KeyboardInterrupt:
            assert stop
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[2][name]), name
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    save_file(states[0], folder / f"resumed{rank}.safetensors")


def one_bad_part() -> None:
    """A loss that is not finite in one process's part stops all processes."""
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[3] = float("nan")
    with pytest.raises(VisadaptError, match="the loss became nan at step 1"):
        fit(injected(), "digits", (x, torch.arange(16) % 10), recipe=RECIPE)


def data_that_cannot_be_shared() -> None:
    x, y = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    with pytest.raises(
        VisadaptError, match="evaluation data for 2 processes must be tensors or a DataLoader, got list"
    ):
        evaluate(injected(), "digits", [(x, y)])
    with pytest.raises(VisadaptError, match=r"2 processes cannot share the evaluation data: .*round multiple"):
        evaluate(injected(), "digits", DataLoader(TensorDataset(x, y), batch_size=3))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    engine = Engine(nn.Linear(2, 2))
    report: dict[str, Any] = {"processes": engine.processes, "precision": engine.precision}
    if engine.processes > 1:
        report |= job(folder)
        stopped_and_resumed(folder)
        one_bad_part()
        data_that_cannot_be_shared()
    (folder / f"report{engine.rank}.json").write_text(json.dumps(report))


def launched(folder: Path, *command: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = (sys.executable, "-m", *command, __file__, str(folder))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("report*.json"))]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    two.mkdir()
    expected = job(alone)
    first, second = launched(two, "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert first == second
    assert (first["processes"], first["precision"], first["best"]) == (2, "fp32", expected["best"])
    for of_two, of_one in zip(first["epochs"], expected["epochs"], strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4)
    assert first["loaded"] == pytest.approx(expected["loaded"], rel=1e-4)
    for name in ("evaluated", "evaluated loader"):
        assert first[name] == pytest.approx(expected[name], rel=1e-4)
    tensors = [load_file(folder / f"rank{rank}.safetensors") for folder, rank in ((two, 0), (two, 1), (alone, 0))]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), f"{name}: the processes do not agree"
        torch.testing.assert_close(tensor, tensors[2][name], rtol=1e-2, atol=1e-3)
    states = [load_file(two / f"resumed{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # the first process writes the log
    assert sorted(file.name for file in two.glob("log*")) == ["log0.jsonl"]


@pytest.mark.slow
def test_accelerate_launch_sets_the_precision(tmp_path: Path) -> None:
    reports = launched(tmp_path, "accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=bf16")
    assert reports == [{"processes": 1, "precision": "bf16"}]
