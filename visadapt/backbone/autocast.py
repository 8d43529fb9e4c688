"""Whether autocast is on, asked on any device."""

from __future__ import annotations

import torch

WITHOUT = frozenset(
    name for name in ("meta", "lazy", "ve", "fpga", "vulkan") if not torch.amp.is_autocast_available(name)
)
"""Types of device that have no autocast; asked here, as not every version of the compiler can ask in a graph."""


def is_autocast(device_type: str) -> bool:
    """Whether operators on a type of device choose their dtypes by autocast.

    ``torch.is_autocast_enabled`` raises a RuntimeError for devices that have none, such as ``meta``.
    """
    return device_type not in WITHOUT and torch.is_autocast_enabled(device_type)
