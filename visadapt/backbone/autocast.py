"""Whether autocast is on, asked on any device."""

from __future__ import annotations

import torch


def is_autocast(device_type: str) -> bool:
    """Whether operators on a type of device choose their dtypes by autocast.

    ``torch.is_autocast_enabled`` raises a RuntimeError for devices that have none, such as ``meta``.
    """
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
