"""Masks of one bit per element."""

from __future__ import annotations

import torch
from torch import Tensor

# multiplied by this, eight bytes of 0 or 1 have their bits side by side in the highest byte, and eight bits are spread
# over the highest bits of eight bytes: the powers 2^0, 2^9, … 2^63 shift by nine, so that no two terms overlap
_SHIFTS = sum(1 << 9 * i for i in range(8)) - (1 << 64)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor, in its memory order, as bytes of eight elements: ``(⌈n/8⌉,)`` uint8. It is written over."""
    flat = _in_memory_order(mask).view(torch.uint8)
    missing = -len(flat) % 8
    words = (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(torch.int64)
    return words.mul_(_SHIFTS).bitwise_right_shift_(56).to(torch.uint8)


def masked(x: Tensor, bits: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """``x`` where the mask is set that `pack` took, else 0; the mask had this shape and memory format."""
    # the highest bit of every byte is an element's; as a signed number it fills an integer of the width of x
    signs = bits.to(torch.int64).mul_(_SHIFTS).view(torch.int8).bitwise_right_shift_(7)[: shape.numel()]
    if memory_format is torch.channels_last:
        n, c, h, w = shape
        signs = signs.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        signs = signs.view(shape)
    # on its bits: torch's CPU kernels that mix bool and float are many times slower
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return signs.to(integer).bitwise_and_(x.view(integer)).view(x.dtype)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format that a dense tensor is in."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _in_memory_order(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) if format_of(x) is torch.channels_last else x.contiguous()).reshape(-1)
