"""Weights that differ from row to row are put together as a batched product takes them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visadapt.methods.stacking import Stacked, rows_for, with_bias


@pytest.mark.parametrize("number", [(0, 1, 2), (2, 0, 1, 0), (0, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_bias_is_one_more_column(number: tuple[int, ...], grad: bool) -> None:
    layers = [nn.Linear(3, 4) for _ in range(max(number) + 1)]
    own = Stacked(layers, rows_for(number, 1, torch.device("cpu")))
    with torch.set_grad_enabled(grad):
        found = with_bias(own, "weight", "bias")
    assert found.requires_grad == grad
    expected = torch.stack([torch.cat([layers[n].weight, layers[n].bias[:, None]], 1) for n in number])
    assert torch.equal(found, expected)
    x, inputs = torch.randn(len(number), 4, 5), torch.randn(len(number), 4, 5)
    # the same bits, wherever the columns lie
    assert torch.equal(torch.baddbmm(x, found, inputs), torch.baddbmm(x, expected, inputs))


@pytest.mark.parametrize("number", [(0, 1, 2), (2, 0, 1, 0), (0, 0)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_each_row_has_the_tensor_of_its_group(number: tuple[int, ...], shape: tuple[int, ...], grad: bool) -> None:
    tensors = [torch.randn(shape, requires_grad=grad) for _ in range(max(number) + 1)]
    with torch.set_grad_enabled(grad):
        found = rows_for(number, 1, torch.device("cpu")).gather(tensors)
    assert found.requires_grad == grad
    assert torch.equal(found, torch.stack([tensors[n] for n in number]))


@pytest.mark.parametrize("number", [(0, 1, 2), (2, 0, 1, 0), (0, 0)])
def test_a_tensor_is_divided_at_once_into_the_rows_of_each_group(number: tuple[int, ...]) -> None:
    rows, x = rows_for(number, 2, torch.device("cpu")), torch.randn(2 * len(number), 3)
    each = rows.divided(x)
    assert all(torch.equal(own, rows.take(x, group)) for group, own in enumerate(each))
    assert torch.equal(rows.join(each), x)


def test_gathering_takes_as_many_operators_for_many_rows_as_for_few() -> None:
    def count(rows: int) -> int:
        calls = 0

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                nonlocal calls
                calls += 1
                return func(*args, **(kwargs or {}))

        tensors = [torch.randn(2, 3) for _ in range(rows)]
        with torch.no_grad(), Counting():
            rows_for(tuple(range(rows)), 1, torch.device("cpu")).gather(tensors)
        return calls

    assert count(3) == count(30)
