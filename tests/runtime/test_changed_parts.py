"""Mixed batches where a module writes to its input, or hooks, dtypes or options change what a task owns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import visadapt
from tests.models import ZOO, stir
from visadapt import Linear, VisadaptError
from visadapt.methods.bottleneck import BottleneckAdapter

TASKS = list("abab")


class Branch(nn.Module):
    """Adds a branch that first changes its input in place, to what that became."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + y


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3), block, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def together_and_alone(model: nn.Module, x: Tensor, tasks: list[str]) -> tuple[Tensor, Tensor]:
    """Outputs of a mixed batch (or of one sample for all tasks), and of each task alone."""
    with visadapt.using(model, tasks):
        mixed = model(x)
    alone = []
    for i, task in enumerate(tasks):
        with visadapt.using(model, task):
            alone.append(model(x if len(x) == 1 else x[i : i + 1])[0])
    return mixed, torch.stack(alone)


def check(model: nn.Module, x: Tensor, tasks: list[str], gradients: bool = False) -> None:
    with torch.set_grad_enabled(gradients):
        mixed, alone = together_and_alone(model, x, tasks)
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    if gradients:
        found = [torch.autograd.grad(y.square().sum(), [p for t in "ab" for p in visadapt.parameters(model, t)],
                                     allow_unused=True, retain_graph=True) for y in (mixed, alone)]  # fmt: skip
        for mine, other in zip(*found, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("tasks", ["abab", "aabb"])
def test_a_branch_that_writes_to_its_input(tasks: str, gradients: bool) -> None:
    model = Net(Branch()).eval()
    for task in "ab":
        visadapt.inject(model, Linear(), task=task, num_classes=3, norms="frozen", train_also=["block.branch"])
        stir(model, task, ord(task))
    check(model, torch.randn(4, 3, 12, 12), list(tasks), gradients)


def test_one_sample_of_a_block_that_writes_to_its_input() -> None:
    model = Net(nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3))).eval()
    for task in "ab":
        visadapt.inject(model, Linear(), task=task, num_classes=3, norms="frozen", train_also=["block"])
        stir(model, task, ord(task))
    check(model, torch.randn(1, 3, 12, 12), list("ab"))


def with_adapters(norms: str = "frozen", **options: Any) -> nn.Module:
    model = ZOO["tiny/resnet"].make()
    for task in "ab":
        visadapt.inject(model, m=4, task=task, num_classes=3, norms=norms, **options)
        stir(model, task, ord(task))
    return model.eval()


def first_of(model: nn.Module, task: str, kind: type[nn.Module]) -> nn.Module:
    with visadapt.using(model, task):
        return next(module for module in model.modules() if isinstance(module, kind))


CHANGES = {
    "a hook on the adapter": lambda part: part.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook on a projection": lambda part: part.down.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "spectral norm": lambda part: parametrizations.spectral_norm(part.down),
    "older spectral norm": lambda part: nn.utils.spectral_norm(part.down),
    "pruned": lambda part: prune.l1_unstructured(part.down, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_an_adapter_acts_in_a_mixed_batch(change: str) -> None:
    model, x = with_adapters(), torch.randn(4, 3, 16, 16)
    with torch.no_grad(), visadapt.using(model, TASKS):
        model(x)  # what is known of the tasks was found out before
    CHANGES[change](first_of(model, "a", BottleneckAdapter))
    check(model, x, TASKS)


def test_a_norm_of_a_task_with_another_epsilon() -> None:
    model = with_adapters("affine")
    registry = model._visadapt
    norms = [own["norm"] for path in registry.hosts if "norm" in (own := registry.parts("a").get(path, {}))]
    assert norms
    for norm in norms:
        norm.eps = 0.5
    check(model, torch.randn(4, 3, 16, 16), TASKS)


def test_tasks_in_several_dtypes() -> None:
    model = ZOO["tiny/resnet"].make().eval()
    visadapt.inject(model, m=4, task="a", num_classes=3, norms="frozen")
    model.bfloat16()
    visadapt.inject(model, m=4, task="b", num_classes=3, norms="frozen")
    x = torch.randn(4, 3, 16, 16).bfloat16()
    with torch.no_grad():
        mixed, alone = together_and_alone(model, x, TASKS)
    torch.testing.assert_close(mixed.float(), alone.float(), rtol=5e-2, atol=5e-2)


def test_a_task_that_comes_after_the_model_became_double() -> None:
    model = ZOO["tiny/resnet"].make().eval()
    visadapt.inject(model, m=4, task="a", num_classes=3)
    model.double()
    visadapt.inject(model, m=4, task="b", num_classes=3).eval()
    with torch.no_grad(), visadapt.using(model, "b"):
        assert model(torch.randn(1, 3, 16, 16).double()).dtype == torch.float64


def test_what_may_be_one_sample_or_several_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for task in "abc":
        visadapt.inject(model, Linear(), task=task, num_classes=4, norms="frozen")
    with torch.no_grad(), visadapt.using(model, list("abc")), pytest.raises(VisadaptError, match="one sample or 3"):
        model(torch.randn(1, 3, 6))
