"""Stacking: the same small computation with other weights for every sample, as one batched operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visadapt.backbone.site import is_channels_first
from visadapt.backbone.tracing import is_tracing


class Rows:
    """Which rows of a batch take which of several weights.

    Args:
        number: for each sample, the number of the weights it takes.
        repeat: rows that a sample has; more than one if the backbone cuts it into windows.
        device: of the batch.
    """

    def __init__(self, number: tuple[int, ...], repeat: int, device: torch.device) -> None:
        self.number = number
        self.repeat = repeat
        self.device = device
        self.groups = max(number) + 1
        rows = [
            [i * repeat + r for i, n in enumerate(number) if n == g for r in range(repeat)] for g in range(self.groups)
        ]
        order = [row for group in rows for row in group]
        self.sizes = [len(group) for group in rows]
        # a group whose rows stand together is a view
        self._starts = [g[0] if g[-1] - g[0] + 1 == len(g) else None for g in rows]
        self._samples = None if number == tuple(range(len(number))) else torch.tensor(number, device=device)
        self._rows = [torch.tensor(group, device=device) for group in rows]
        self._order = None if order == sorted(order) else torch.tensor(order, device=device)

    def take(self, tensor: Tensor, group: int) -> Tensor:
        """The rows of one group."""
        start = self._starts[group]
        if start is not None:
            return tensor.narrow(0, start, self.sizes[group])
        return tensor.index_select(0, self._rows[group])

    def put(self, tensor: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        """The tensor with other rows for some groups, in its memory format."""
        changed = tensor.clone()
        for group, own in values.items():
            changed.index_copy_(0, self._rows[group], own.to(tensor.dtype))
        return changed

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The groups' rows back in the batch's order."""
        joined = torch.cat(tensors)
        return joined if self._order is None else torch.empty_like(joined).index_copy_(0, self._order, joined)

    def gather(self, tensors: Sequence[Tensor], repeat: bool = True) -> Tensor:
        """``(N, …)``: for each row the tensor of its group; with ``repeat=False`` once per sample."""
        if all(tensor is tensors[0] for tensor in tensors):
            stacked = tensors[0].expand(len(self.number), *tensors[0].shape)
        else:
            stacked = torch.stack(list(tensors))
            stacked = stacked if self._samples is None else stacked.index_select(0, self._samples)
        return stacked.repeat_interleave(self.repeat, 0) if repeat and self.repeat > 1 else stacked

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        return [*self._rows, *[t for t in (self._order, self._samples) if t is not None]]


_KEPT: dict[tuple[tuple[int, ...], int, torch.device], Rows] = {}


def rows_for(number: tuple[int, ...], repeat: int, device: torch.device) -> Rows:
    """The `Rows` of a pattern: the dozens of hosts of one forward share it, and so do later batches."""
    if is_tracing():
        return Rows(number, repeat, device)
    key = (number, repeat, device)
    found = _KEPT.get(key)
    if found is None:
        # a tensor made in inference mode could take no part in training later
        with torch.inference_mode(False):
            found = Rows(number, repeat, device)
        if all(type(tensor) is Tensor for tensor in found.tensors()):  # and not a tracer's stand-in
            if len(_KEPT) >= 256:
                _KEPT.clear()
            _KEPT[key] = found
    return found


def pointwise(modules: Sequence[Any], rows: Rows, x: Tensor, layout: str) -> Tensor:
    """y = W_t·x + b_t at every position, with the weights of each sample's task t.

    Args:
        modules: one `visadapt.methods.layers.Pointwise` per task.
        rows: which of them each row of ``x`` takes.
        x: ``(N, C, …)`` or ``(N, …, C)`` with any number of axes of positions, none at all too.
        layout: of ``x``.
    """
    maps = is_channels_first(layout)
    if maps and x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return pointwise(modules, rows, x.movedim(1, -1), "NLC").movedim(-1, 1)
    # Parallel's shared factor is a buffer
    weight = rows.gather([module._parameters.get("weight", module._buffers.get("weight")) for module in modules], maps)
    bias = None if modules[0].bias is None else rows.gather([module.bias for module in modules], maps)
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if maps:
        flat = x.flatten(2)
        y = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias[:, :, None], weight, flat)
        return y.view(x.shape[0], -1, *x.shape[2:])
    # the windows of one sample are one long sequence
    flat = x.reshape(len(rows.number), -1, x.shape[-1])
    back = weight.transpose(1, 2)
    y = torch.bmm(flat, back) if bias is None else torch.baddbmm(bias[:, None, :], flat, back)
    return y.view(*x.shape[:-1], -1)
