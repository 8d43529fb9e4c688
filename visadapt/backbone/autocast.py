"""Check whether autocast is on, on any device."""

from __future__ import annotations

import torch

WITHOUT = frozenset(
    name for name in ("meta", "lazy", "ve", "fpga", "vulkan") if not torch.amp.is_autocast_available(name)
)
"""Device types without autocast; found out once, since not every version of ``torch.compile`` can trace the query."""


def is_autocast(device_type: str) -> bool:
    """Whether operators on a type of device choose their dtypes by autocast.

    ``torch.is_autocast_enabled`` raises a RuntimeError for devices that have none, such as ``meta``.
    """
    return device_type not in WITHOUT and torch.is_autocast_enabled(device_type)
