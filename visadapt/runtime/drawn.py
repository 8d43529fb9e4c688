"""Whether a task's new head still holds the values that it was drawn with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def bits_of(modules: Iterable[nn.Module]) -> int | None:
    """Sum the bits of all parameters of some modules, as integers; None without parameters, or on the meta device.

    The sum is the same on every device and in every copy. It changes with the dtype and with nearly every change of the
    values, which a version counter would not show in a copy or in a loaded file.
    """
    parameters = [p for module in modules for p in module.parameters()]
    if not parameters or any(p.is_meta or type(p) is not nn.Parameter for p in parameters):
        return None
    return sum(int(_integers(p.detach()).sum(dtype=torch.int64)) * (i + 1) for i, p in enumerate(parameters))


def _integers(tensor: Tensor) -> Tensor:
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])
