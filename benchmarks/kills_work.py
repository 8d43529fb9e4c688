"""Work that writes files, small enough to be killed many times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import visadapt
from benchmarks.reliability_subjects import digest, network
from visadapt.cli.app import app
from visadapt.data.hub import resolve
from visadapt.experiments import Compare, Contender, ImageProblem, read_results, run_experiment
from visadapt.training import Recipe, fit

BUILD: dict[str, Any] = {"pretrained": False, "channels": (8, 8, 16, 16)}

_OLD = '{"input": "old"}\n'


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        name: for the table.
        run: does the work in a folder, or what is left of it, and describes its numbers.
        look: reads what there is, and raises if it is not whole.
        begin: writes what is there before.
    """

    name: str
    run: Callable[[Path], Any]
    look: Callable[[Path], Any]
    begin: Callable[[Path], Any] = lambda folder: None


def _adapted(value: float, **options: Any) -> nn.Module:
    model: nn.Module = visadapt.inject(network(), m=2, task="t", num_classes=3, **options)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "t"):
            parameter.fill_(value)
    return model.eval()


def _save(folder: Path, value: float = 0.5) -> str:
    return digest(visadapt.save(_adapted(value), "t", folder / "t.visadapt").read_bytes())


def _loaded(folder: Path) -> None:
    model = network()
    visadapt.load(model, folder / "t.visadapt")
    values = {float(p.mean()) for p in visadapt.parameters(model, "t")}
    if values not in ({0.25}, {0.5}):
        raise AssertionError("neither the old nor the new file")


def _fit(folder: Path) -> str:
    torch.manual_seed(1)
    model = visadapt.inject(network(), visadapt.Bottleneck(2, dropout=0.2), task="t", num_classes=3, norms="full")
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(12, 3, 32, 32, generator=generator), torch.arange(12) % 3
    recipe = Recipe(epochs=3, lr=1e-2, batch_size=4)
    history = fit(model, "t", data, recipe=recipe, checkpoint=folder / "checkpoint", checkpoint_every=1)
    return digest(*model.state_dict().values(), [epoch.loss for epoch in history.epochs])


def _images(folder: Path) -> None:
    for label, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (*color[:2], color[2] + number)).save(
                folder / "images" / label / f"{number}.png"
            )


def _train(folder: Path) -> str:
    out = folder / "t.visadapt"
    words = ["train", folder / "images", "--backbone", "timm/resnet10t", "--build", "pretrained=false", "--size", "32"]
    words += ["--build", "channels=[8,8,16,16]", "--m", "2", "--epochs", "2", "--batch-size", "4", "--out", out]
    words += ["--checkpoint", folder / "checkpoint", "--force"]
    answer = CliRunner().invoke(app, [str(word) for word in words])
    if answer.exit_code:
        raise AssertionError(answer.output)
    return digest(out.read_bytes())


def _trained(folder: Path) -> None:
    file = folder / "t.visadapt"
    if file.exists():
        visadapt.open(file, build=BUILD, backbone="timm/resnet10t")


def _old_answers(folder: Path) -> None:
    """Images, a task for them, and the answers of an earlier prediction."""
    _images(folder)
    torch.manual_seed(0)
    model = visadapt.inject(resolve("timm/resnet10t", **BUILD), m=2, task="t", num_classes=2, labels=("red", "blue"))
    visadapt.save(model, "t", folder / "t.visadapt", notes={"inputs": {"kind": "images", "size": 32}})
    (folder / "answers.jsonl").write_text(_OLD, encoding="utf-8")


def _predict(folder: Path) -> str:
    out = folder / "answers.jsonl"
    words = ["predict", folder / "images", "--task", folder / "t.visadapt", "--out", out, "--force"]
    words += ["--backbone", "timm/resnet10t", "--build", "pretrained=false", "--build", "channels=[8,8,16,16]"]
    answer = CliRunner().invoke(app, [str(word) for word in (*words, "--batch-size", "4")])
    if answer.exit_code:
        raise AssertionError(answer.output)
    # the folder is another each time
    return digest([{**json.loads(line), "input": 0} for line in out.read_text(encoding="utf-8").splitlines()])


def _predicted(folder: Path) -> None:
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    if text != _OLD and len([json.loads(line) for line in text.splitlines()]) != 20:
        raise AssertionError("neither the old nor the new answers")


def _sweep(folder: Path) -> list[Any]:
    sizes: dict[str, Any] = {"train": 16, "validation": 16, "test": 16, "size": 16, "options": tuple(BUILD.items())}
    problem = ImageProblem("timm/resnet10t", "digits", **sizes)
    recipe = Recipe(epochs=1, head_first=False)
    contender = Contender("bottleneck", visadapt.Bottleneck(2), recipe, rates=(1e-3, 1e-2))
    found = run_experiment(Compare((problem,), (contender,), (0,)), folder / "results", say=lambda line: None)
    # the time that a run took is in its task file, so that the file's size varies
    return [{**dataclasses.asdict(result), "seconds": 0, "bytes": 0, "machine": 0} for result in found]


def _swept(folder: Path) -> int:
    return len(read_results(folder / "results")) if (folder / "results").exists() else 0


def _cache(folder: Path) -> str:
    model = network()
    visadapt.inject(model, m=2, task="late", where="layer4", norms="frozen", num_classes=3)
    inputs = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cached = visadapt.cache_prefix(model, "late", inputs, file=folder / "features", batch_size=4)
    return digest(cached.features)


WORK = (
    Work("save", _save, _loaded, lambda folder: _save(folder, 0.25)),
    Work("fit with a checkpoint", _fit, lambda folder: None),
    Work("visadapt train", _train, _trained, _images),
    Work("visadapt predict --out", _predict, _predicted, _old_answers),
    Work("sweep of an experiment", _sweep, _swept),
    Work("prefix cache", _cache, lambda folder: None),
)
