"""The loop on an accelerator: no step waits for the device, and results stay exact when losses are read later."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import visadapt
from tests.models import ZOO
from tests.training.conftest import state
from visadapt import VisadaptError
from visadapt.data import ImageSet, normalize
from visadapt.training import Diverged, Fit, Recipe, fit
from visadapt.training import loop as loop_module
from visadapt.training.loop import Loop

RECIPE = Recipe(epochs=2, lr=1e-2, batch_size=10, head_first=False)


def make() -> nn.Module:
    torch.manual_seed(0)
    return visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10)


def data(digits: ImageSet, count: int = 70) -> tuple[Tensor, Tensor]:
    return normalize(digits.train.images[:count]), digits.train.labels[:count]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let losses be read every third step, as on an accelerator every 32nd."""
    init = Loop.__init__

    def patched(self: Loop, *args: Any) -> None:
        init(self, *args)
        self.read_every = 3

    monkeypatch.setattr(Loop, "__init__", patched)


def exact(result: Fit) -> Fit:
    return dataclasses.replace(result, epochs=tuple(dataclasses.replace(e, seconds=0.0) for e in result.epochs))


class Enough(Exception):  # noqa: N818
    """Ends a run."""


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_losses_that_are_read_later_give_the_same_bits_stopped_or_not(
    digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, stop: int
) -> None:
    expected = fit(model := make(), "digits", data(digits), recipe=RECIPE)
    request.getfixturevalue("late")
    found = fit(again := make(), "digits", data(digits), recipe=RECIPE)
    assert exact(found) == exact(expected)
    left = stop

    def prepare(batch: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise Enough
        return batch

    file = tmp_path / "digits.checkpoint"
    options: dict[str, Any] = {"recipe": RECIPE, "checkpoint": file, "checkpoint_every": 1}
    with pytest.raises(Enough):
        fit(make(), "digits", data(digits), prepare=prepare, **options)
    resumed = fit(third := make(), "digits", data(digits), prepare=lambda batch: batch, **options)
    assert exact(resumed) == exact(expected)
    for other in (again, third):
        assert all(torch.equal(tensor, state(model)[name]) for name, tensor in state(other).items())


@pytest.mark.usefixtures("late")
def test_a_divergence_that_is_read_later_names_its_step_and_leaves_the_last_good_state(
    digits: ImageSet, tmp_path: Path
) -> None:
    model, file = make(), tmp_path / "digits.checkpoint"
    before, calls = state(model), 0

    def poison(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return batch * (float("nan") if calls == 4 else 1)

    options: dict[str, Any] = {"recipe": RECIPE, "prepare": poison, "checkpoint": file, "checkpoint_every": 3}
    with pytest.raises(Diverged, match="the loss became nan at step 4 of 14; the last good state is kept"):
        fit(model, "digits", data(digits), **options)
    assert calls == 6, "it was read after the sixth step"
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    # the checkpoint is that of the third step
    calls = 100
    result = fit(model, "digits", data(digits), **options)
    assert exact(result) == exact(fit(make(), "digits", data(digits), recipe=RECIPE))


class NoWaiting(TorchDispatchMode):
    """Refuses to read a value from a tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert function not in waits, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [1.0, None])
def test_no_step_reads_a_value(digits: ImageSet, monkeypatch: pytest.MonkeyPatch, clip: float | None) -> None:
    step, steps = Loop.step, 0

    def watched(self: Loop, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if self.run.steps == 0:
            # the first checks the labels
            return step(self, *args)
        with NoWaiting():
            return step(self, *args)

    monkeypatch.setattr(Loop, "step", watched)
    monkeypatch.setattr(loop_module, "READ_EVERY", 1)
    fit(make(), "digits", data(digits), recipe=RECIPE.replace(grad_clip=clip))
    assert steps == 14


def test_fast_computes_in_bf16_and_channels_last(digits: ImageSet) -> None:
    model, seen = make(), []
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    handle = conv.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    result = fit(model, "digits", data(digits), recipe=RECIPE.replace(fast=True))
    handle.remove()
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in seen)
    assert {out.dtype for _, out in seen} == {torch.bfloat16}
    assert {p.dtype for p in visadapt.parameters(model, "digits")} == {torch.float32}
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last) for m in model.modules() if isinstance(m, nn.Conv2d)
    )


def test_options_that_contradict_each_other_are_refused(digits: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="precision must be 'bf16' or None with a recipe that is fast=True"):
        fit(make(), "digits", data(digits), recipe=RECIPE.replace(fast=True), precision="fp32")
    with pytest.raises(VisadaptError, match="no compile mode 'reduce-overhed'; did you mean 'reduce-overhead'"):
        RECIPE.replace(compile="reduce-overhed")
    with pytest.raises(VisadaptError, match="fast must be True or False, got 1"):
        RECIPE.replace(fast=1)
    file = tmp_path / "digits.checkpoint"
    fit(make(), "digits", data(digits), recipe=RECIPE, checkpoint=file)
    with pytest.raises(VisadaptError, match="recipe: fast was False, is True; precision was fp32, is bf16"):
        fit(make(), "digits", data(digits), recipe=RECIPE.replace(fast=True), checkpoint=file)
    torch.manual_seed(0)
    model = visadapt.inject(
        ZOO["tiny/resnet"].make(), m=4, task="digits", num_classes=10, where="layer4", norms="frozen"
    )
    images, labels = data(digits)
    cached = visadapt.cache_prefix(model, "digits", images)
    with pytest.raises(VisadaptError, match="compile='default' compiles whole models, and prepare= is a cached prefix"):
        fit(model, "digits", (cached.rows, labels), recipe=RECIPE.replace(compile="default"), prepare=cached)
    cached.prefix.close()


def test_graphs_are_refused_where_there_are_none(digits: ImageSet) -> None:
    with pytest.raises(VisadaptError, match="device must be a CUDA device for compile='graphs', got 'cpu'"):
        fit(make(), "digits", data(digits), recipe=RECIPE.replace(compile="graphs"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps_train_as_others_do(digits: ImageSet) -> None:
    expected = fit(make(), "digits", data(digits), recipe=RECIPE)
    found = fit(model := make(), "digits", data(digits), data(digits), recipe=RECIPE.replace(compile="default"))
    assert [e.loss for e in found.epochs] == pytest.approx([e.loss for e in expected.epochs], rel=1e-3)
    assert list(model.state_dict()) == list(make().state_dict())
