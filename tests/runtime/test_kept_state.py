"""Modules that keep tensors between their calls, and adapters inside autograd functions of a model's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import visadapt
from tests.models import stir
from visadapt import Bottleneck, Full, LoRA, VisadaptError
from visadapt.methods.method import Method

TASKS = ["a", "b", "b", "a"]


class Cell(nn.Module):
    """A recurrent cell that keeps its state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 4)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = 0 if self.state is None or len(self.state) != len(x) else self.state
        self.state = torch.tanh(x @ self.weight + before)
        return self.state


class Recurrent(nn.Module):
    """Runs its cell on each token, from a state of zeros or from that of the batch before."""

    def __init__(self, continues: bool) -> None:
        super().__init__()
        self.stem, self.cell, self.fc, self.continues = nn.Linear(6, 8), Cell(), nn.Linear(8, 3), continues

    def forward(self, x: Tensor) -> Tensor:
        if not self.continues:
            self.cell.state = None
        for token in self.stem(x).unbind(1):
            self.cell(token)
        return self.fc(self.cell.state)


class Shown(Recurrent):
    """Reads what its cell stored, which the cell itself does not read."""

    def forward(self, x: Tensor) -> Tensor:
        self.cell.state = None
        self.cell(self.stem(x).mean(1))
        return self.fc(self.cell.state)


def injected(model: nn.Module, method: Method) -> nn.Module:
    torch.manual_seed(0)
    where = None if isinstance(method, Full) else "stem"
    for seed, task in enumerate("ab"):
        visadapt.inject(model, method, task=task, norms="frozen", where=where, example=torch.randn(2, 5, 6))
        stir(model, task, seed)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("method", [Full(), LoRA(r=2)])
@pytest.mark.parametrize("kind", [Recurrent, Shown])
def test_no_task_meets_the_state_of_another(kind, method) -> None:
    model, x = injected(kind(False), method), torch.randn(4, 5, 6)
    with visadapt.using(model, TASKS):
        mixed = model(x)
    for task, rows in (("a", [0, 3]), ("b", [1, 2])):
        with visadapt.using(model, task):
            torch.testing.assert_close(mixed[rows], model(x[rows]))


@torch.no_grad()
def test_a_state_from_batch_to_batch_cannot_be_shared() -> None:
    model, x = injected(Recurrent(True), Full()), torch.randn(4, 5, 6)
    with visadapt.using(model, TASKS), pytest.raises(VisadaptError, match=r"keeps a tensor .*\(cell\.state\)"):
        model(x)
    # all rows together, where the tasks only add to them
    model = injected(Recurrent(True), LoRA(r=2))
    with visadapt.using(model, TASKS):
        assert not torch.equal(model(x), model(x))


class Stretch(nn.Module):
    """Computes its blocks again in backward, so that only its input and output are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.blocks, self.stem(x), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_adapters_that_would_get_no_gradients_are_refused() -> None:
    torch.manual_seed(0)
    model, x = Stretch(), torch.randn(4, 6)
    for task in "ab":
        visadapt.inject(model, Bottleneck(m=2), task=task, where="blocks.0", example=x)
    for tasks in ("a", TASKS):
        with visadapt.using(model.eval(), tasks):
            model(x)
        with visadapt.using(model.train(), tasks):
            with torch.no_grad():
                model(x)
            with pytest.raises(
                VisadaptError, match=r"task 'a' at blocks\.0 would get no gradients.*CheckpointFunction"
            ):
                model(x)
            model(x.clone().requires_grad_()).sum().backward()
        gradients = [p.grad for p in visadapt.parameters(model, "a")]
        assert all(gradient is not None for gradient in gradients)
