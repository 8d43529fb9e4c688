"""An interrupted training run resumes from its checkpoint, and from no other, with bit-identical results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import visadapt
from tests.models import ZOO
from tests.training.conftest import state
from visadapt import VisadaptError
from visadapt.data import ImageSet, augment, normalize
from visadapt.data.inputs import ImageInputs
from visadapt.training import Fit, Recipe, fit

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(epochs=3, lr=1e-2, head_lr=3e-2, batch_size=32, head_first=False)


class Killed(Exception):  # noqa: N818
    """Simulates the end of the process."""


def after(calls: int) -> Callable[[Tensor], Tensor]:
    """A ``prepare`` that raises ``Killed`` in its n-th call."""
    left = calls

    def prepare(batch: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return normalize(batch)

    return prepare


def make(seed: int = 0) -> nn.Module:
    backbone = ZOO["tiny/resnet"].make()
    # the same backbone for every seed, but other adapters and another head
    torch.manual_seed(seed)
    method = visadapt.Bottleneck(8, dropout=0.3)
    return visadapt.inject(backbone, method, task="digits", num_classes=10, norms="full")


def without_seconds(result: Fit) -> Any:
    """All of a result except durations."""
    return result.best, result.steps, [(epoch.number, epoch.loss, epoch.score) for epoch in result.epochs]


def trained(model: nn.Module, digits: ImageSet, **changes: Any) -> Fit:
    options: dict[str, Any] = {"recipe": RECIPE, "prepare": normalize, "augment": augment, "metric": "loss", "seed": 3}
    data = {"train": digits.train.subset(range(100)), "validation": digits.test.subset(range(40))}
    return fit(model, "digits", **{**data, **options, **changes})


@pytest.fixture(scope="module")
def whole(digits: ImageSet) -> tuple[Any, dict[str, Tensor]]:
    """The result of an uninterrupted run: per epoch four steps and a forward pass on validation data."""
    model = make()
    return without_seconds(trained(model, digits)), state(model)


# within the first epoch, at its validation, within the second and at the last step of the third
@pytest.mark.parametrize(("stop", "every"), [(4, None), (4, 1), (5, 4), (8, None), (8, 2), (14, 1)])
def test_the_same_bits_as_without_a_stop(
    digits: ImageSet, whole: Any, tmp_path: Path, stop: int, every: int | None
) -> None:
    file = tmp_path / "digits.checkpoint"
    with pytest.raises(Killed):
        trained(make(), digits, checkpoint=file, checkpoint_every=every, prepare=after(stop))
    # the second process starts with other adapters and another random state
    model = make(seed=7)
    result = trained(model, digits, checkpoint=file, checkpoint_every=every)
    assert without_seconds(result) == whole[0]
    assert all(torch.equal(whole[1][name], tensor) for name, tensor in state(model).items())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_many_stops_one_after_another(digits: ImageSet, whole: Any, tmp_path: Path) -> None:
    file, stops = tmp_path / "digits.checkpoint", 0
    while True:
        model = make(seed=stops)
        try:
            result = trained(model, digits, checkpoint=file, checkpoint_every=1, prepare=after(4))
            break
        except Killed:
            stops += 1
    assert stops == 4
    assert without_seconds(result) == whole[0]
    assert all(torch.equal(whole[1][name], tensor) for name, tensor in state(model).items())


def test_a_finished_training_run_returns_at_once(digits: ImageSet, tmp_path: Path) -> None:
    file, model, twin = tmp_path / "digits.checkpoint", make(), make(seed=1)
    assert any(not torch.equal(tensor, state(twin)[name]) for name, tensor in state(model).items())
    first = trained(model, digits, checkpoint=file)
    written = file.read_bytes()
    again = trained(twin, digits, checkpoint=file, prepare=after(1))
    assert again == first
    assert all(torch.equal(tensor, state(twin)[name]) for name, tensor in state(model).items())
    assert file.read_bytes() == written


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Uses torch's global generator, like torchvision's transforms."""

    def __init__(self, digits: ImageSet) -> None:
        self.images, self.labels = normalize(digits.train.images[:64]), digits.train.labels[:64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i] + 0.1 * torch.randn(()), self.labels[i]


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "its own generator"])
def test_a_shuffling_loader_with_random_transforms(digits: ImageSet, tmp_path: Path, own: bool) -> None:
    def run(file: Path | None, stop: int) -> tuple[Any, dict[str, Tensor]]:
        model, left = make(), stop

        def prepare(batch: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return batch

        generator = torch.Generator().manual_seed(5) if own else None
        loader = DataLoader(Noisy(digits), batch_size=16, shuffle=True, generator=generator)
        recipe = RECIPE.replace(epochs=2)
        options: dict[str, Any] = {} if file is None else {"checkpoint": file, "checkpoint_every": 1}
        return without_seconds(fit(model, "digits", loader, recipe=recipe, prepare=prepare, **options)), state(model)

    expected = run(None, 0)
    file = tmp_path / "digits.checkpoint"
    with pytest.raises(Killed):
        run(file, 7)
    found = run(file, 0)
    assert found[0] == expected[0]
    assert all(torch.equal(expected[1][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_plain_network_trained_by_sgd(digits: ImageSet, tmp_path: Path, layout: torch.memory_format) -> None:
    def run(file: Path | None, prepare: Any) -> tuple[Any, dict[str, Tensor]]:
        model = ZOO["tiny/resnet"].make().to(memory_format=layout)
        recipe = RECIPE.replace(optimizer="sgd", lr=1e-3)
        data = digits.train.subset(range(100))
        options: dict[str, Any] = {} if file is None else {"checkpoint": file, "checkpoint_every": 1}
        return without_seconds(fit(model, None, data, recipe=recipe, prepare=prepare, **options)), state(model)

    expected = run(None, normalize)
    file = tmp_path / "plain.checkpoint"
    with pytest.raises(Killed):
        run(file, after(7))
    found = run(file, normalize)
    assert found[0] == expected[0]
    assert all(torch.equal(expected[1][name], tensor) for name, tensor in found[1].items())


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    digits: ImageSet, whole: Any, tmp_path: Path
) -> None:
    file, calls = tmp_path / "digits.checkpoint", 0

    def poison(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return normalize(batch) * (float("nan") if calls == 8 else 1)

    with pytest.raises(VisadaptError, match="the loss became nan at step 7 of 12; the last good state is kept"):
        trained(make(), digits, checkpoint=file, prepare=poison)
    model = make(seed=1)
    assert without_seconds(trained(model, digits, checkpoint=file)) == whole[0]
    assert all(torch.equal(whole[1][name], tensor) for name, tensor in state(model).items())


@pytest.fixture(scope="module")
def written(digits: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("resume") / "digits.checkpoint"
    trained(make(), digits, checkpoint=file, recipe=RECIPE.replace(epochs=1))
    return file


def _other_weights() -> nn.Module:
    model = make()
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)  # type: ignore[union-attr, index, operator]
    return model


def _other_method() -> nn.Module:
    return visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": RECIPE.replace(epochs=1, lr=0.5)}, r"another training run: recipe: lr was 0\.01, is 0\.5$"),
        ({"recipe": RECIPE.replace(epochs=2)}, "recipe: epochs was 1, is 2"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"metric": "accuracy"}, "metric was loss, is accuracy"),
        ({"precision": "bf16"}, "precision was fp32, is bf16"),
        ({"accumulate": 2}, "parts of a batch was 1, is 2"),
        ({"prepare": ImageInputs(8)}, r"inputs was None, is {'size': 8"),
        ({"augment": None}, "augmentation was True, is False"),
        ({"validation": None}, "validation data was .*, is None"),
        ({"model": _other_weights}, r"another backbone: other weights in layer1\.0"),
        (
            {"model": _other_method},
            r"task: methods was \['Bottleneck\(m=8, dropout=0.3\)'\], is \['Bottleneck\(m=4\)'\]",
        ),
    ],
)
def test_another_training_run_is_refused_with_what_differs(
    digits: ImageSet, written: Path, change: dict[str, Any], words: str
) -> None:
    content = written.read_bytes()
    model = change.pop("model", make)()
    before = state(model)
    with pytest.raises(VisadaptError, match=words):
        trained(model, digits, **{"checkpoint": written, "recipe": RECIPE.replace(epochs=1), **change})
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert written.read_bytes() == content


def test_other_data_is_refused(digits: ImageSet, written: Path) -> None:
    data = digits.train.subset(range(100))
    data.images[50, 0, 3, 3] ^= 1
    options: dict[str, Any] = {"checkpoint": written, "recipe": RECIPE.replace(epochs=1)}
    with pytest.raises(VisadaptError, match="training data: digest of inputs was"):
        trained(make(), digits, train=data, **options)
    with pytest.raises(VisadaptError, match="validation data: samples was 40, is 30"):
        trained(make(), digits, validation=digits.test.subset(range(30)), **options)


def test_a_file_that_is_not_a_checkpoint_is_refused_and_left_alone(digits: ImageSet, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary")
    task = visadapt.save(make(), "digits", tmp_path / "digits.visadapt")
    for file in (text, task):
        content = file.read_bytes()
        with pytest.raises(VisadaptError, match=r"is not a (whole )?checkpoint of a training run"):
            trained(make(), digits, checkpoint=file)
        assert file.read_bytes() == content
    with pytest.raises(VisadaptError, match=r"no folder '.*nowhere' to write the checkpoint digits\.checkpoint to"):
        trained(make(), digits, checkpoint=tmp_path / "nowhere" / "digits.checkpoint")
    with pytest.raises(VisadaptError, match=r"^checkpoint_every .*positive int.*, got 0$"):
        trained(make(), digits, checkpoint=tmp_path / "digits.checkpoint", checkpoint_every=0)


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import hashlib, os, pathlib, sys, time
            import torch, visadapt
            from tests.models import ZOO
            from visadapt.data import augment, load_images, normalize
            from visadapt.training import JsonLines, Recipe, fit

            folder, stall = pathlib.Path(sys.argv[1]), int(os.environ.get("STALL", 0))
            calls = 0

            def prepare(batch):
                global calls
                calls += 1
                if calls == stall:
                    (folder / "here").touch()
                    time.sleep(600)
                return normalize(batch)

            digits = load_images("digits", size=16)
            method = visadapt.Bottleneck(8, dropout=0.2)
            model = visadapt.inject(ZOO["tiny/resnet"].make(), method, task="digits", num_classes=10, norms="full")
            train, validation = digits.train.subset(range(200)), digits.test.subset(range(50))
            options = dict(prepare=prepare, augment=augment, log=JsonLines(folder / "log.jsonl"), progress=False)
            options |= dict(checkpoint=folder / "digits.checkpoint", checkpoint_every=3)
            result = fit(model, "digits", train, validation, Recipe(epochs=3, lr=1e-2), **options)
            digest = hashlib.sha256()
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
            print(digest.hexdigest(), [(epoch.loss, epoch.score) for epoch in result.epochs])
            """
        )
    )

    def start(folder: Path, stall: int = 0) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "STALL": str(stall), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), str(folder)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    # per epoch seven steps and a validation: stop in the second epoch's fifth step, two after a checkpoint
    killed, waited = start(tmp_path / "killed", stall=13), time.monotonic()
    while not (tmp_path / "killed" / "here").exists():
        assert killed.poll() is None
        assert time.monotonic() - waited < 300
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate() == ("", None)
    assert killed.returncode == -signal.SIGKILL
    again, _ = start(tmp_path / "killed").communicate(timeout=300)
    expected, _ = start(tmp_path / "whole").communicate(timeout=300)
    assert again == expected != ""
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    assert logs[0] == logs[1]
    assert [line["epoch"] for line in logs[0]] == [1, 2, 3]
