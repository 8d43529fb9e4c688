"""Checksums of weights, to find out whether tensors have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = 1 << 13
"""Bytes up to which tensors are compared value by value; larger ones are compared by partial sums."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Checksums:
    """The values of some tensors, reduced to a few numbers.

    A version counter misses writes through ``.data``, and an address may be reused, so the values themselves are read:
    small tensors are kept, and of large ones the sums, modulo 2⁶⁴, of eight parts of their memory.
    A tensor that was scaled, replaced, written to or moved to another dtype is noticed; one that was moved to another
    device is not. Reading costs about as much as copying the tensors would, and on an accelerator one synchronisation.

    Args:
        tensors: in an order that must be the same in both checksums that are compared.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.looks = [(t.shape, t.dtype) if type(t) in _PLAIN else _identity(t) for t in tensors]
        plain = [t.detach() for t in tensors if type(t) in _PLAIN and not t.is_meta]
        self.values: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for device in dict.fromkeys(t.device for t in plain):
                here = [t for t in plain if t.device == device]
                small = [_bytes(t) for t in here if t.nbytes <= _SMALL]
                large = [_sums(t) for t in here if t.nbytes > _SMALL]
                numbers = torch.cat(large) if large else torch.empty(0, dtype=torch.int64, device=device)
                kept = torch.cat([*small, numbers.view(torch.uint8)])
                self.values.append(kept.cpu())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checksums):
            return NotImplemented
        alike = self.looks == other.looks and len(self.values) == len(other.values)
        return alike and all(torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _identity(tensor: Tensor) -> Any:
    # sharded and quantised tensors have their values elsewhere
    return id(tensor), -1 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sums(tensor: Tensor) -> Tensor:
    """The sums of eight parts of a tensor's memory, read as 64-bit integers, and of the few bytes behind them."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    flat = (tensor.permute(0, 2, 3, 1) if last else tensor).reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = len(octets) // 64 * 64
    words = octets[:whole].view(torch.int64).view(8, -1).sum(1)
    return torch.cat([words, octets[whole:].sum(dtype=torch.int64)[None]])
