"""Weights that differ from row to row are put together as a batched product takes them."""

import pytest
import torch
from torch import nn

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
