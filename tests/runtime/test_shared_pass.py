"""Several tasks of one sample: one pass of the backbone wherever the tasks only act behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.methods.families import FAMILIES, TEXT
from tests.models import answer, stir
from visadapt import Ladder, VisadaptError
from visadapt.methods.baselines import Linear

ALL = FAMILIES | TEXT
NAMES = ["task0", "task1", "task2", "task1", "task3"]


def with_ladders(make: Any, count: int = 4, **options: Any) -> nn.Module:
    model = make()
    for i in range(count):
        visadapt.inject(model, Ladder(m=3, **options), task=f"task{i}", num_classes=3 + i % 2)
        stir(model, f"task{i}", seed=i)
    return model.eval()


def rows_of(model: nn.Module) -> tuple[dict[str, list[int]], list[Any]]:
    """How many rows each convolution and linear of the backbone is called with, from now on."""
    seen: dict[str, list[int]] = {}

    def count(name: str) -> Any:
        return lambda _m, args: seen.setdefault(name, []).append(len(args[0]) if args else 0)

    handles = [
        module.register_forward_pre_hook(count(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and "visadapt" not in name
    ]
    return seen, handles


def equals_alone(model: nn.Module, inputs: dict[str, Tensor], names: list[str | None]) -> None:
    logits = answer(model, inputs, names)
    assert len(logits) == len(names)
    for i, name in enumerate(names):
        alone = answer(model, inputs, name)
        torch.testing.assert_close(logits[i : i + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
        assert torch.isneginf(logits[i, alone.shape[1] :]).all()


def counted(model: nn.Module, inputs: dict[str, Tensor], tasks: Any) -> dict[str, int]:
    """Rows that each convolution and linear of the backbone computes."""
    seen, handles = rows_of(model)
    answer(model, inputs, tasks)
    for handle in handles:
        handle.remove()
    return {name: sum(rows) for name, rows in seen.items()}


BEHIND = {
    "tiny/vgg": ["classifier.0", "classifier.3", "classifier.6"],
    "transformers/bert": ["bert.pooler.dense", "classifier"],
}
"""Layers behind the last block; one of all others has a head of one layer."""


@pytest.mark.parametrize("family", ALL)
def test_every_task_answers_as_alone_from_one_pass(family) -> None:
    model, inputs = with_ladders(ALL[family].make), ALL[family].inputs(1)
    equals_alone(model, inputs, NAMES)
    one, every = counted(model, inputs, "task0"), counted(model, inputs, NAMES)
    more = [name for name in one if every[name] > one[name]]
    assert len(one) > 4
    assert more == BEHIND.get(family, list(one)[-1:])


@pytest.mark.parametrize("methods", ["linear", "last stage", "everywhere", "all kinds"])
@pytest.mark.parametrize("family", ["tiny/bottleneck-resnet", "timm/vit", "transformers/bert"])
def test_other_methods(family, methods) -> None:
    """What lies below the first adapter runs once; above it every task has a row of its own."""
    model, inputs = ALL[family].make(), ALL[family].inputs(1)
    last = {"tiny/bottleneck-resnet": "layer4.1", "timm/vit": "blocks.1", "transformers/bert": "bert.encoder.layer.1"}
    given: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "linear": [(Linear(), {"norms": "frozen"})],
        "last stage": [(visadapt.Bottleneck(m=2), {"where": last[family], "norms": "frozen"})],
        "everywhere": [(visadapt.Bottleneck(m=2), {})],
        "all kinds": [(Linear(), {"norms": "frozen"}), (Ladder(m=2), {}), (Ladder(m=3), {}), (visadapt.LoRA(r=2), {})],
    }
    for i in range(4):
        method, options = given[methods][i % len(given[methods])]
        visadapt.inject(model, method, task=f"task{i}", num_classes=3 + i % 2, **options)
        stir(model, f"task{i}", seed=i)
    model.eval()
    equals_alone(model, inputs, [*NAMES, None])
    if methods in ("linear", "last stage"):
        one, every = counted(model, inputs, "task0"), counted(model, inputs, NAMES)
        behind = [name for name in one if every[name] > one[name]]
        # a head of a task's own divides the features itself
        assert len(behind) <= len(one) // 2
        assert bool(behind) == (methods == "last stage")


class KeepsItsBatch(nn.Module):
    """Reads the number of samples at its start and uses it at its end, as heads of decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block(self.first(x))
        return self.head(features)[torch.arange(len(x))]


def test_a_model_that_keeps_the_size_of_its_batch_is_given_the_sample_several_times() -> None:
    torch.manual_seed(0)
    model = KeepsItsBatch()
    for i in range(4):
        visadapt.inject(model, visadapt.Bottleneck(m=2), task=f"task{i}", num_classes=3, where="block", norms="frozen")
        stir(model, f"task{i}", seed=i)
    model.eval()
    equals_alone(model, {"x": torch.randn(1, 8)}, NAMES)


def test_a_training_step_whose_hooks_replace_outputs_counts_its_sample_once() -> None:
    model, inputs = with_ladders(FAMILIES["tiny/resnet"].make).train(), FAMILIES["tiny/resnet"].inputs(1)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    own: list[bool] = []
    norm.register_forward_hook(lambda module, _, out: (own.append(module is norm), out * 2)[1])
    with visadapt.using(model, NAMES):
        model(**inputs)
    assert own.count(True) == 1


def test_gradients_are_the_sum_of_the_tasks_alone() -> None:
    model, inputs = with_ladders(FAMILIES["tiny/resnet"].make), FAMILIES["tiny/resnet"].inputs(1)
    names = [f"task{i}" for i in range(4)]
    expected = {}
    for name in names:
        with visadapt.using(model, name):
            model(**inputs).square().sum().backward()
        expected[name] = [p.grad.clone() for p in visadapt.parameters(model, name)]
        model.zero_grad()
    with visadapt.using(model, names):
        logits = model(**inputs)
    sum(rows.square().sum() for rows in visadapt.split(model, logits, names).values()).backward()
    for name in names:
        found = [p.grad for p in visadapt.parameters(model, name)]
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


def test_three_tasks_of_an_image_of_three_channels() -> None:
    model, inputs = with_ladders(FAMILIES["tiny/resnet"].make), FAMILIES["tiny/resnet"].inputs(1)
    assert inputs["x"].shape[:2] == (1, 3)
    equals_alone(model, inputs, NAMES[:3])


def test_several_samples_need_a_task_each() -> None:
    model, inputs = with_ladders(FAMILIES["tiny/resnet"].make), FAMILIES["tiny/resnet"].inputs(2)
    with pytest.raises(VisadaptError, match="4 tasks were named for a batch of 2: name one per sample"):
        answer(model, inputs, NAMES[:4])


def test_a_task_that_changed_is_looked_at_again() -> None:
    """Tasks of other methods part elsewhere, and a second sample of the same size is answered as the first."""
    family = FAMILIES["tiny/resnet"]
    model = with_ladders(family.make)
    equals_alone(model, family.inputs(1), NAMES)
    visadapt.remove(model, "task1")
    visadapt.inject(model, m=2, task="task1", num_classes=3)
    stir(model, "task1", seed=9)
    model.eval()
    equals_alone(model, {"x": torch.randn_like(family.inputs(1)["x"])}, NAMES)
