"""Stacking: the same small computation with other weights for every sample, as one batched operation.

A part whose class has a method ``rowwise`` computes a whole batch of mixed tasks at once: all tasks' parts there have
its options, and it gets tensors by name, with one entry per row (`Own`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.operators import as_kernel, convolve
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
        self._rows: list[list[int]] = [[] for _ in range(self.groups)]
        for i, n in enumerate(number):
            self._rows[n] += range(i * repeat, (i + 1) * repeat)
        order = [row for group in self._rows for row in group]
        self.sizes = [len(group) for group in self._rows]
        # contiguous rows of a group are a view
        self._starts = [g[0] if g[-1] - g[0] + 1 == len(g) else None for g in self._rows]
        self._order = None if order == sorted(order) else order
        self._is_each = number == tuple(range(len(number)))
        self._indices: dict[int | str, Tensor] = {}

    def _index(self, key: int | str, rows: Sequence[int]) -> Tensor:
        if is_tracing():
            return torch.tensor(rows, device=self.device)
        found = self._indices.get(key)
        if found is None:
            # a tensor made in inference mode could not be used in training later
            with torch.inference_mode(False):
                found = torch.tensor(rows, device=self.device)
            if type(found) is Tensor:  # not a tracer's proxy
                self._indices[key] = found
        return found

    def take(self, tensor: Tensor, group: int) -> Tensor:
        """The rows of one group."""
        start = self._starts[group]
        if start is not None:
            return tensor.narrow(0, start, self.sizes[group])
        return tensor.index_select(0, self._index(group, self._rows[group]))

    def divided(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each group, taken by one operator for all groups; they may be views of one tensor."""
        lying = tensor if self._order is None else tensor.index_select(0, self._index("order", self._order))
        starts = [0, *accumulate(self.sizes)]
        return [lying.narrow(0, start, size) for start, size in zip(starts, self.sizes, strict=False)]

    def put(self, tensor: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        """The tensor with other rows for some groups, in its memory format."""
        changed = tensor.clone()
        for group, own in values.items():
            changed.index_copy_(0, self._index(group, self._rows[group]), own.to(tensor.dtype))
        return changed

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The groups' rows back in the batch's order."""
        joined = torch.cat(tensors)
        if self._order is None:
            return joined
        return torch.empty_like(joined).index_copy_(0, self._index("order", self._order), joined)

    def gather(self, tensors: Sequence[Tensor], repeat: bool = True) -> Tensor:
        """``(N, …)``: for each row the tensor of its group; with ``repeat=False`` once per sample."""
        first = tensors[0]
        if all(tensor is first for tensor in tensors):
            stacked = first.expand(len(self.number), *first.shape)
        elif self._is_each:
            stacked = _stack(tensors)
        elif not torch.is_grad_enabled():
            # one copy instead of two
            stacked = _stack([tensors[n] for n in self.number])
        else:
            stacked = _stack(tensors).index_select(0, self._index("samples", self.number))
        return stacked.repeat_interleave(self.repeat, 0) if repeat and self.repeat > 1 else stacked


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` of tensors of one shape, without the operator per tensor with which that adds an axis."""
    first = tensors[0]
    if first.ndim == 0:
        return torch.stack(list(tensors))
    return torch.cat(list(tensors)).reshape(len(tensors), *first.shape)


_KEPT: dict[tuple[tuple[int, ...], int, torch.device], Rows] = {}


def rows_for(number: tuple[int, ...], repeat: int, device: torch.device) -> Rows:
    """The `Rows` of a pattern: the dozens of hosts of one forward share it, and so do later batches."""
    if is_tracing():
        return Rows(number, repeat, device)
    key = (number, repeat, device)
    found = _KEPT.get(key)
    if found is None:
        found = Rows(number, repeat, device)
        if len(_KEPT) >= 256:
            _KEPT.clear()
        _KEPT[key] = found
    return found


class Own(Protocol):
    """The tensors of parts with one profile, one entry per row of a batch.

    Attributes:
        samples: how many samples the batch has.
    """

    @property
    def samples(self) -> int: ...

    def __call__(self, name: str, repeat: bool = True) -> Tensor:
        """``(N, …)``: a parameter or buffer by its name in the part, such as ``down.weight``, per row.

        Args:
            name: of the tensor.
            repeat: whether there is one per row, or one per sample.
        """

    def of(self, child: str) -> Own:
        """The same for a module inside the part."""


class Stacked:
    """`Own` of a list of parts, one for each group of rows."""

    def __init__(self, parts: Sequence[nn.Module], rows: Rows) -> None:
        self.parts, self.rows = parts, rows
        self.samples = len(rows.number)

    def __call__(self, name: str, repeat: bool = True) -> Tensor:
        return self.rows.gather(self.tensors(name), repeat)

    def tensors(self, name: str) -> list[Tensor]:
        """One per part."""
        *path, last = name.split(".")
        modules = self._inside(path)
        # not by getattr, which is slow on a module: there may be thousands
        held = modules[0].__dict__
        where = next((kind for kind in ("_parameters", "_buffers") if last in held[kind]), None)
        if where is None:
            return [getattr(module, last) for module in modules]
        return [module.__dict__[where][last] for module in modules]

    def is_apart(self, matrix: str, x: Tensor) -> bool:
        """Whether few groups of rows have matrices that cost more to gather per row than rows cost to gather."""
        if self.rows.groups * 2 > self.samples or is_tracing():
            return False
        return self.samples * self.tensors(matrix)[0].numel() > 4 * x.numel()

    def of(self, child: str) -> Stacked:
        return Stacked(self._inside(child.split(".")), self.rows)

    def _inside(self, path: Sequence[str]) -> Sequence[nn.Module]:
        modules = self.parts
        for step in path:
            modules = [module.__dict__["_modules"][step] for module in modules]
        return modules


class Single:
    """`Own` of one part that all rows share: one entry stands for all."""

    samples = 1

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, name: str, repeat: bool = True) -> Tensor:
        module, (*path, last) = self.part, name.split(".")
        for step in path:
            module = module.__dict__["_modules"][step]
        # not by getattr, which a module answers slowly
        value: Any = module.__dict__["_parameters"].get(last)
        found: Tensor = (getattr(module, last) if value is None else value)[None]
        return found

    def of(self, child: str) -> Single:
        return Single(self.part.get_submodule(child))


def pointwise(own: Own, x: Tensor, layout: str, bias: bool = True, matrix: str = "weight") -> Tensor:
    """y = W_t·x + b_t at every position, with the weights of each sample's task t.

    Args:
        own: of a `visadapt.methods.layers.Pointwise`, a linear, a 1×1 convolution or another module with a matrix.
        x: ``(N, C, …)`` or ``(N, …, C)`` with any number of position axes, including none.
        layout: of ``x``.
        bias: whether there is one.
        matrix: the name of W, outputs × inputs.
    """
    maps = is_channels_first(layout)
    if is_spread(x) and own.samples == len(x):
        return _pointwise_of_one(own, x[0], layout, bias, matrix)
    if maps and x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return pointwise(own, x.movedim(1, -1), "NLC", bias, matrix).movedim(-1, 1)
    if isinstance(own, Stacked) and own.is_apart(matrix, x):
        rows, shifts = own.rows, own.tensors("bias") if bias else None
        each, rank = [], x.ndim - 2
        for group, weight in enumerate(own.tensors(matrix)):
            z = rows.take(x, group)
            w, b = _in_dtype_of(x, weight.flatten(1), None if shifts is None else shifts[group])
            each.append(convolve(rank, z, as_kernel(w, rank), b) if maps and rank else F.linear(z, w, b))
        return rows.join(each)
    weight, shift = own(matrix, maps), own("bias", maps) if bias else None
    return product(weight.flatten(2), shift, x, layout, own.samples)


def product(weight: Tensor, shift: Tensor | None, x: Tensor, layout: str, samples: int) -> Tensor:
    """y = W·x + b at every position, with other W and b for each row of maps, or for each sample of tokens.

    Args:
        weight: ``(N, outputs, inputs)``.
        shift: ``(N, outputs)``, or None.
        x: ``(N, C, …)`` or ``(N, …, C)``.
        layout: of ``x``.
        samples: of the batch, each of which may have several rows of tokens.
    """
    weight, shift = _in_dtype_of(x, weight, shift)
    if is_channels_first(layout):
        flat = x.flatten(2)
        y = torch.bmm(weight, flat) if shift is None else torch.baddbmm(shift[:, :, None], weight, flat)
        return y.view(x.shape[0], -1, *x.shape[2:])
    # the windows of one sample are one long sequence
    flat = x.reshape(samples, -1, x.shape[-1])
    back = weight.transpose(1, 2)
    y = torch.bmm(flat, back) if shift is None else torch.baddbmm(shift[:, None, :], flat, back)
    return y.view(*x.shape[:-1], -1)


def with_bias(own: Own, matrix: str, vector: str) -> Tensor:
    """A matrix per sample with a vector as one more column, ``(N, outputs, inputs + 1)``: the bias of another input 1.

    Args:
        own: of a part.
        matrix: name of a tensor ``(outputs, inputs)``.
        vector: name of a tensor ``(outputs,)``.
    """
    if not isinstance(own, Stacked) or own.rows.groups == 1 or torch.is_grad_enabled() or is_tracing():
        return torch.cat([own(matrix, False), own(vector, False)[:, :, None]], 2)
    # one copy of each matrix instead of two: side by side, which batched products take as they lie
    columns = [vector[:, None] for vector in own.tensors(vector)]
    pairs = list(zip(own.tensors(matrix), columns, strict=True))
    beside = torch.cat([tensor for number in own.rows.number for tensor in pairs[number]], 1)
    return beside.view(len(beside), own.samples, -1).transpose(0, 1)


def in_groups(x: Tensor, convolution: Callable[[Tensor], Tensor]) -> Tensor:
    """A convolution of maps ``(N, C, …)`` with each row's own kernel: the rows are groups of channels of one sample.

    Args:
        x: channels first.
        convolution: is given ``(1, N·C, …)``.
    """
    y = convolution(x.flatten(0, 1)[None])
    return y.reshape(x.shape[0], -1, *y.shape[2:])


def _in_dtype_of(x: Tensor, weight: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Convert a matrix and its bias to the dtype of ``x``; under autocast the operators choose their dtype."""
    if is_autocast(x.device.type):
        return weight, shift
    return weight.to(x.dtype), None if shift is None else shift.to(x.dtype)


def shares_memory(x: Tensor) -> bool:
    """Whether all rows of a tensor share the memory of one."""
    return x.ndim > 0 and len(x) > 1 and x.stride(0) == 0


def is_spread(x: Tensor) -> bool:
    """Whether one row can be computed for all, as they are the same; a tracer's rows may differ later."""
    return not is_tracing() and shares_memory(x)


def _pointwise_of_one(own: Own, x: Tensor, layout: str, bias: bool, matrix: str) -> Tensor:
    """The same for one row ``x`` that all tasks' weights act on: one product with all of them."""
    weight, shift = _in_dtype_of(x, own(matrix).flatten(2), own("bias") if bias else None)
    count = len(weight)
    if is_channels_first(layout):
        flat, tall = x.flatten(1), weight.flatten(0, 1)
        y = tall @ flat if shift is None else torch.addmm(shift.flatten()[:, None], tall, flat)
        return y.view(count, -1, *x.shape[1:])
    wide = nn.functional.linear(x, weight.flatten(0, 1), None if shift is None else shift.flatten())
    return wide.view(*wide.shape[:-1], count, -1).movedim(-2, 0)


def added_pointwise(own: Own, x: Tensor, y: Tensor, layout: str) -> Tensor:
    """y + W_t·x + b_t: `pointwise` added to another tensor, which takes its memory once."""
    plain = x.dtype == y.dtype and not is_autocast(x.device.type)
    if not (plain and is_channels_first(layout) and y.ndim > 2 and own.samples == len(x)):
        return y + pointwise(own, x, layout).to(y.dtype)
    weight, flat = with_bias(own, "weight", "bias").to(x.dtype), x.flatten(2)
    # the bias is the weight of one more input, which is one everywhere
    inputs = torch.cat([flat, flat.new_ones(()).expand(len(flat), 1, flat.shape[2])], 1)
    return torch.baddbmm(y.flatten(2), weight, inputs).view(y.shape)


def depthwise(own: Own, x: Tensor, padding: int = 1) -> Tensor:
    """A depthwise convolution of channels-first maps ``(N, C, …)`` with each row's own kernel."""
    kernel, shift, rank = own("weight").flatten(0, 1), own("bias").flatten(), x.ndim - 2
    return in_groups(x, lambda flat: convolve(rank, flat, kernel, shift, padding=padding, groups=flat.shape[1]))


def batch_norm(own: Callable[[str], Tensor | None], x: Tensor, eps: float) -> Tensor:
    """A BatchNorm of maps ``(N, C, …)`` in eval mode with each row's own affine part and statistics.

    Args:
        own: of the norm.
        x: channels first.
        eps: of the norm.
    """
    mean, var, weight, bias = (cast("Tensor", own(name)) for name in ("running_mean", "running_var", "weight", "bias"))
    wide = x if x.dtype == weight.dtype or is_autocast(x.device.type) else x.to(weight.dtype)
    if wide.is_contiguous():
        # samples × channels as channels: the kernel that a task alone would use, so results are bit-identical
        flat = wide.view(1, -1, *wide.shape[2:]) if wide.ndim > 2 else wide.view(1, -1)
        stats = (mean.flatten(), var.flatten(), weight.flatten(), bias.flatten())
        return F.batch_norm(flat, *stats, training=False, eps=eps).view_as(wide).to(x.dtype)
    ones = [1] * (x.ndim - 2)
    scale = weight * torch.rsqrt(var + eps)
    shift = torch.addcmul(bias, mean, scale, value=-1)
    return torch.addcmul(shift.view(*shift.shape, *ones), wide, scale.view(*scale.shape, *ones)).to(x.dtype)


def as_vector(vector: Tensor, x: Tensor, layout: str) -> Tensor:
    """Reshape a vector per row, ``(N, C)``, to multiply the channels of ``x``."""
    ones = [1] * (x.ndim - 2)
    return (
        vector.view(-1, vector.shape[-1], *ones)
        if is_channels_first(layout)
        else vector.view(-1, *ones, vector.shape[-1])
    )
