"""Walks over modules do what torch's own do."""

import copy

import pytest
import torch
from torch import nn

from visadapt.runtime.classes import frozen_class
from visadapt.runtime.quick_walks import load_state


class Counts(nn.Module):
    """A module with state beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(2, 2), 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count = int(state)


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.__class__ = frozen_class(nn.BatchNorm2d)
    return norm


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(3, 2), lambda: nn.BatchNorm1d(3), frozen_norm, lambda: nn.LSTM(3, 4), Counts]
)
def test_a_state_is_taken_as_load_state_dict_takes_it(build) -> None:
    given, one, other = (nn.Sequential(build(), nn.LayerNorm(3)) for _ in range(3))
    if isinstance(given[0], Counts):
        given[0].count = 7
    with torch.no_grad():
        for tensor in given.parameters():
            tensor.normal_()
    one[1].bias.requires_grad_(False)
    state = given.state_dict(keep_vars=True)
    load_state(one, state)
    assert {name for name, tensor in one.named_parameters() if not tensor.requires_grad} == {"1.bias"}
    other.load_state_dict(state, assign=True)
    for name, tensor in other.state_dict(keep_vars=True).items():
        assert torch.equal(one.state_dict(keep_vars=True)[name], tensor)
    for (name, tensor), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert tensor is same is state[name]
    if isinstance(given[0], nn.LSTM):
        # which keeps its parameters in a list of its own as well
        x = torch.randn(2, 5, 3)
        assert torch.equal(one[0](x)[0], copy.deepcopy(given)[0](x)[0])
