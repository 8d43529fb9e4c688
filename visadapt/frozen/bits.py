"""Masks at one bit an element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor, in its memory order, as bytes of eight elements: ``(⌈n/8⌉,)`` uint8."""
    flat = _in_memory_order(mask)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    eights = torch.nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (eights * torch.tensor(_WEIGHTS, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """The bool tensor that :func:`pack` took, which had this shape and memory format."""
    count = shape.numel()
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).view(torch.bool)
    else:
        weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=bits.device)
        flat = (bits[:, None] & weights).ne(0).view(-1)[:count]
    if memory_format is torch.channels_last:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format that a dense tensor is in."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _in_memory_order(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) if format_of(x) is torch.channels_last else x.contiguous()).reshape(-1)
