"""The kinds of file that reliability is measured on, and what reading one of them gives."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import visadapt
from visadapt import Method
from visadapt.experiments import Result, read_results, write_csv
from visadapt.experiments.record import write
from visadapt.report import table
from visadapt.tensor_file import raw
from visadapt.training import Recipe, fit

METHODS: tuple[Method, ...] = (
    visadapt.Bottleneck(2),
    visadapt.Parallel(),
    visadapt.Parallel(rank=2),
    visadapt.Series(),
    visadapt.TSA(align=True),
    visadapt.DAN(diagonal=True),
    visadapt.DAN(bits=8),
    visadapt.ConvAdapter(),
    visadapt.SSF(),
    visadapt.LoRA(r=2),
    visadapt.Norms(),
    visadapt.Biases(),
    visadapt.TopLayers(),
    visadapt.Full(),
)


@dataclass
class Subject:
    """One kind of file.

    Args:
        name: for the table.
        file: an intact one.
        use: reads a file and describes what follows from it: outputs, as a digest.
        state: describes what must not change if the file is refused.
        kind: key of the description in a safetensors file; "" for a JSON file; None if only bytes are changed.
        other: whether damage that is not refused may give other outputs, since the file carries no digest.
    """

    name: str
    file: Path
    use: Callable[[Path], str]
    state: Callable[[], str] = lambda: ""
    kind: str | None = None
    other: bool = False


def digest(*values: Any) -> str:
    """Digest of tensors and of other values by their ``repr``."""
    found = hashlib.sha256()
    for value in values:
        found.update(raw(value) if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


def network() -> nn.Module:
    """A narrow ResNet with random weights, the same each time."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", channels=(8, 8, 16, 16), num_classes=4)
    return model.eval()


def _weights(model: nn.Module) -> str:
    names = list(visadapt.tasks(model))
    return digest(*model.state_dict().values(), names, visadapt.active(model) if names else None, model.training)


def tasks(folder: Path, methods: tuple[Method, ...] = METHODS) -> Iterator[Subject]:
    """Task files, one per method."""
    bare, x = network(), torch.randn(2, 3, 32, 32)

    def use(file: Path) -> str:
        name = visadapt.load(bare, file, task="m")
        try:
            with torch.no_grad(), visadapt.using(bare, name):
                return digest(bare(x))
        finally:
            visadapt.eject(bare)
            bare.eval()

    for number, method in enumerate(methods):
        norms = "frozen" if isinstance(method, visadapt.Biases) else "full"
        model = visadapt.inject(network(), method, task="t", num_classes=3, labels=("x", "y", "z"), norms=norms)
        with torch.no_grad():
            for parameter in visadapt.parameters(model, "t"):
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        file = visadapt.save(model, "t", folder / f"{number}.visadapt", notes={"by": ["me", 1]})
        yield Subject(f"task of {method}", file, use, lambda: _weights(bare), "visadapt")


def decider(folder: Path) -> Subject:
    """A decider of two tasks."""
    model, x = network(), torch.randn(4, 3, 32, 32)
    for task in "ab":
        visadapt.inject(model, m=2, task=task, num_classes=2)
    visadapt.fit_decider(model, {"a": [torch.randn(4, 3, 32, 32)], "b": [torch.randn(4, 3, 32, 32) + 1]}, steps=5)

    def use(file: Path) -> str:
        visadapt.load_decider(model, file)
        return digest(visadapt.decide(model, x))

    file = visadapt.save_decider(model, folder / "decider")
    return Subject("decider", file, use, lambda: _weights(model), "visadapt_decider")


class _Stopped(Exception):  # noqa: N818
    pass


def checkpoint(folder: Path) -> Subject:
    """A checkpoint in the middle of a training run."""
    model = visadapt.inject(network(), m=2, task="t", num_classes=3, norms="full").eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    recipe, calls = Recipe(epochs=2, batch_size=2), [0]

    def prepare(batch: Tensor) -> Tensor:
        calls[0] += 1
        # two batches for the features of the head, one to try the head, and one training step
        if calls[0] == 5:
            raise _Stopped
        return batch

    def run(file: Path) -> Any:
        options = {"checkpoint": file, "checkpoint_every": 1, "progress": False}
        return fit(model, "t", data, recipe=recipe, prepare=prepare, **options)

    def use(file: Path) -> str:
        history = run(file)
        found = digest(*model.state_dict().values(), [epoch.loss for epoch in history.epochs])
        model.load_state_dict(before)
        return found

    with contextlib.suppress(_Stopped):
        run(folder / "checkpoint")
    model.load_state_dict(before)
    return Subject("checkpoint", folder / "checkpoint", use, lambda: _weights(model), "visadapt_training")


def cache(folder: Path) -> Iterator[Subject]:
    """The two files of a prefix cache; what differs is computed again, so that nothing is ever refused."""
    model, x = network(), torch.randn(4, 3, 32, 32)
    visadapt.inject(model, m=2, task="late", where="layer4", norms="frozen", num_classes=3)
    whole, place = folder / "features", folder / "copies"
    place.mkdir()

    def features(file: Path) -> str:
        cached = visadapt.cache_prefix(model, "late", x, file=file)
        cached.prefix.close()
        return digest(cached.features)

    features(whole)
    for name in ("features", "features.key"):

        def use(file: Path, name: str = name) -> str:
            for own in ("features", "features.key"):
                shutil.copy(file if own == name else folder / own, place / own)
            return features(place / "features")

        yield Subject(f"prefix cache, {name}", folder / name, use, lambda: _weights(model))


def results(folder: Path) -> Iterator[Subject]:
    """Results of experiments, as JSON and as a table."""
    words = {"experiment": "compare", "modality": "image", "network": "net", "problem": "data", "contender": "who"}
    numbers = {"trained": 1, "head": 1, "backbone": 9, "seconds": 1.0, "bytes": 9, "lr": 0.1, "epochs": 1}
    one = Result(key="k0", **words, seed=0, split="test", metric="accuracy", score=0.5, **numbers, facts={"m": [1, 2]})

    def use(file: Path) -> str:
        found = read_results(file)
        return digest(found, str(table(found)) if found else "", table(found).html() if found else "")

    made = write(one, folder)
    yield Subject("result", made, use, kind="", other=True)
    yield Subject("table of results", write_csv([one, one], folder / "results.csv"), use, other=True)


def subjects(folder: Path) -> Iterator[Subject]:
    """All of them, each with an intact file in a folder."""
    yield from tasks(folder)
    yield decider(folder)
    yield checkpoint(folder)
    yield from cache(folder)
    yield from results(folder)
