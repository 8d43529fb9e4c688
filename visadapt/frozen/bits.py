"""Masks of one bit per element."""

from __future__ import annotations

import torch
from torch import Tensor

# multiplied by this, eight bytes of 0 or 1 have their bits side by side in the highest byte, and eight bits are spread
# over the highest bits of eight bytes: the powers 2^0, 2^9, … 2^63 shift by nine, so that no two terms overlap
_SHIFTS = sum(1 << 9 * i for i in range(8)) - (1 << 64)

_LOWEST = sum(1 << 8 * i for i in range(8))


def pack(mask: Tensor) -> Tensor:
    """A bool tensor, in its memory order, as bytes of eight elements: ``(⌈n/8⌉,)`` uint8."""
    flat = _in_memory_order(mask).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    return (words.mul(_SHIFTS) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """The bool tensor that `pack` took, which had this shape and memory format."""
    words = bits.to(torch.int64).mul_(_SHIFTS).bitwise_right_shift_(7).bitwise_and_(_LOWEST)
    flat = words.view(torch.bool)[: shape.numel()]
    if memory_format is torch.channels_last:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is set, else 0."""
    # on its bits: torch's CPU kernels that mix bool and float are many times slower
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return mask.view(torch.int8).neg().to(integer).bitwise_and_(x.view(integer)).view(x.dtype)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format that a dense tensor is in."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _in_memory_order(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) if format_of(x) is torch.channels_last else x.contiguous()).reshape(-1)
