"""Autograd functions for frozen layers: each keeps for the backward pass only what the gradient of its input needs.

After Bhatia & Dangel 2024, "Lowering PyTorch's Memory Consumption for Selective Differentiation" (arXiv 2404.12406): a
layer that does not learn need not remember what its own gradient would be made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from visadapt.frozen.bits import format_of, pack, unpack


class FrozenConv(Function):
    """y = W∗x + b with W and b frozen: keeps neither input nor output; ∂L/∂x needs W alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.weight, ctx.settings = weight, (stride, padding, dilation, groups)
        ctx.shape, ctx.dtype, ctx.format = x.shape, x.dtype, format_of(x)
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.settings
        # only the shape and layout of the input are read when nothing but its own gradient is asked for
        like = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device, memory_format=ctx.format)
        found, _, _ = torch.ops.aten.convolution_backward(
            grad, like, ctx.weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return found, None, None, None, None, None, None


class MaskedReLU(Function):
    """y = max(x, 0): keeps one bit an element, where y is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.shape, ctx.format = y.shape, format_of(y)
        ctx.bits = pack(y > 0)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * unpack(ctx.bits, ctx.shape, ctx.format), None


class IndexedMaxPool(Function):
    """Max-pooling that keeps its indices, as 32-bit integers, and not its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        y: Tensor
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *settings)
        ctx.settings, ctx.shape, ctx.format = settings, x.shape, format_of(x)
        ctx.indices = indices.int()
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        found = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *ctx.settings, ctx.indices.long())
        return found, None
