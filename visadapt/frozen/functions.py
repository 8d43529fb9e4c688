"""Autograd functions for frozen layers: each keeps for the backward pass only what the gradient of its input needs.

After Bhatia & Dangel 2024, "Lowering PyTorch's Memory Consumption for Selective Differentiation" (arXiv 2404.12406): a
frozen layer does not keep what only the gradient of its weights would need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.compact import Compact
from visadapt.backbone.site import is_channels_first
from visadapt.frozen.bits import format_of, masked, pack
from visadapt.methods.bottleneck import BottleneckAdapter


def _gradient(backward: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    """A backward pass without a second derivative, which computes in its own dtypes under any autocast."""

    def run(ctx: Any, grad: Tensor) -> Any:
        if not is_autocast(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    made: Callable[..., Any] = once_differentiable(run)
    return made


def version(tensor: Tensor) -> int:
    """Number of writes to a tensor; inference tensors do not count them."""
    tensor = tensor.stored.values if isinstance(tensor, Compact) else tensor
    return -1 if tensor.is_inference() else tensor._version


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight, compact or not, as an ordinary tensor of this dtype."""
    return weight.dense(dtype) if isinstance(weight, Compact) else weight.to(dtype)


def _check_unchanged(weight: Tensor, before: int, what: str) -> None:
    if version(weight) != before:
        raise RuntimeError(
            f"the weight {tuple(weight.shape)} of a frozen {what}, needed for gradient computation, has been modified "
            "by an inplace operation since the forward"
        )


class FrozenLinear(Function):
    """y = W·x + b with W and b frozen: keeps only a reference to W, which may be compact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.weight, ctx.version, ctx.transposed, ctx.dtype = weight, version(weight), transposed, x.dtype
        matrix = in_dtype(weight, x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        return F.linear(x, matrix.t() if transposed else matrix, shift)

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_unchanged(ctx.weight, ctx.version, "linear")
        matrix = in_dtype(ctx.weight, ctx.dtype)
        return grad @ (matrix.t() if ctx.transposed else matrix), None, None, None


class FrozenConv(Function):
    """y = W∗x + b with W and b frozen: keeps neither input nor output; ∂L/∂x needs W alone.

    It computes in the dtype of x, which autocast may have chosen; no copy of W in that dtype is kept. W is not a saved
    tensor, so that a checkpoint that is computed again may use an equivalent W (a folded one).
    """

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
        ctx.weight, ctx.version, ctx.settings = weight, version(weight), (stride, padding, dilation, groups)
        ctx.shape, ctx.dtype, ctx.format = x.shape, x.dtype, format_of(x)
        kernel, shift = in_dtype(weight, x.dtype), None if bias is None else bias.to(x.dtype)
        y: Tensor = torch.ops.aten.convolution(
            x, kernel, shift, stride, padding, dilation, False, [0] * len(stride), groups
        )
        return y

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check_unchanged(ctx.weight, ctx.version, "convolution")
        kernel = in_dtype(ctx.weight, ctx.dtype)
        stride, padding, dilation, groups = ctx.settings
        needed = [True, False, False]
        pointwise = ctx.weight.shape[2:] == (1, 1) and groups == 1 and not any(padding)
        if pointwise and (format_of(grad) is torch.channels_last or _is_large(grad)) and grad.device.type == "cpu":
            return _spread(_products(grad, kernel), ctx.shape, stride), *[None] * 6
        # only the shape and layout of the input are read if its gradient alone is needed
        like = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device, memory_format=ctx.format)
        found, _, _ = torch.ops.aten.convolution_backward(
            grad,
            like,
            kernel,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            needed,
        )
        return found, None, None, None, None, None, None


class MaskedReLU(Function):
    """y = min(max(x, 0), limit): keeps one bit per element, set where y is neither 0 nor the limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, limit: float | None = None) -> Tensor:
        if limit is None:
            y = x.relu_() if inplace else x.relu()
        else:
            y = x.clamp_(0, limit) if inplace else x.clamp(0, limit)
        if inplace:
            ctx.mark_dirty(x)
        ctx.shape, ctx.format = y.shape, format_of(y)
        # y is not negative, and torch compares with 0 several times as fast by !=
        positive = y.to(torch.bool)
        ctx.save_for_backward(pack(positive if limit is None else positive & (y < limit)))
        return y

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return masked(grad, bits, ctx.shape, ctx.format), None, None


class MaskedDropout(Function):
    """y = x·z/(1 − p) with z drawn from {0, 1} as torch's dropout draws it: keeps z, one bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cpu":
            noise = torch.empty_like(x).bernoulli_(1 - p)
            mask = noise.bool()
            y = noise.div_(1 - p).mul_(x)
        else:
            y, mask = torch.native_dropout(x, p, True)
        ctx.p, ctx.shape, ctx.format = p, y.shape, format_of(y)
        ctx.save_for_backward(pack(mask))
        return y

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return masked(grad, bits, ctx.shape, ctx.format).mul_(1 / (1 - ctx.p)), None


class IndexedMaxPool(Function):
    """Max-pooling that keeps its indices, as 32-bit integers, and not its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        y: Tensor
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *settings)
        ctx.settings, ctx.shape, ctx.format = settings, x.shape, format_of(x)
        ctx.save_for_backward(indices.int())
        return y

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        found = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *ctx.settings, indices.long())
        return found, None


class Activation(Function):
    """y = φ(x) for an elementwise φ: keeps x, in the chosen dtype, and no intermediate result of φ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], keep: torch.dtype) -> Tensor:
        ctx.function, ctx.dtype = function, x.dtype
        ctx.save_for_backward(x.to(keep))
        return function(x)

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        leaf = x.to(ctx.dtype).detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(leaf)
        return torch.autograd.grad(y, leaf, grad)[0], None, None


class LayerNorm(Function):
    """y = γ·(x − μ)/σ + β: keeps x in the chosen dtype, μ and σ in their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        keep: torch.dtype,
    ) -> Tensor:
        y: Tensor
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.save_for_backward(x.to(keep), mean, rstd, weight, bias)
        return y

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x.to(ctx.dtype), ctx.shape, mean, rstd, weight, bias, needed
        )
        return (*found, None, None, None)


class FrozenNorm(Function):
    """y = γ·(x − μ)/σ + β with everything but x frozen: keeps γ/σ, one number per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _BatchNorm) -> Tensor:
        mean, var = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
        scale = torch.rsqrt(var + norm.eps)
        ctx.scale = scale if norm.weight is None else scale * norm.weight
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scale = ctx.scale.view(1, -1, *[1] * (grad.ndim - 2))
        return (grad * scale).to(grad.dtype), None


class NormInput(NamedTuple):
    """The input of a BatchNorm, from which its output is recomputed.

    Attributes:
        x: its input, possibly in a narrower dtype.
        dtype: of its output.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    dtype: torch.dtype


class OwnBatchNorm(Function):
    """y = γ·(x − μ)/σ + β with the statistics frozen and γ, β a task's own: keeps x, in the chosen dtype.

    The next layer need not keep y: it keeps the same `NormInput` and calls `output`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kept: NormInput) -> Tensor:
        ctx.eps, ctx.dtype = kept.eps, kept.dtype
        ctx.save_for_backward(kept.x, weight, bias, kept.mean, kept.var)
        return F.batch_norm(x, kept.mean, kept.var, weight, bias, eps=kept.eps)

    @staticmethod
    def output(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        """y, made again."""
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, mean, var = ctx.saved_tensors
        # CUDA's kernel reads the statistics where training mode saves them
        saved = (mean, torch.rsqrt(var + ctx.eps)) if grad.is_cuda else (None, None)
        found = torch.ops.aten.native_batch_norm_backward(
            grad, x.to(ctx.dtype), weight, mean, var, *saved, False, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return (*found, None)


class Bottleneck(Function):
    """a(h) = h + W2·φ(W1·h + b1) + b2: keeps W1·h + b1, and h once, or not at all if a norm keeps its input.

    φ(·) is recomputed, at the width of the bottleneck; so is W1·h + b1 if h is kept in a narrower dtype. If h is the
    output of a norm, ``source`` is what that norm keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, adapter: BottleneckAdapter, keep: torch.dtype, source: NormInput | None, *weights: Tensor
    ) -> Tensor:
        y, z = adapter.with_inner(h)
        ctx.adapter, ctx.dtype, ctx.source = adapter, z.dtype, None if source is None else source[5:]
        kept = (h.to(keep),) if source is None else source[:5]
        ctx.save_for_backward(z if keep == h.dtype or z.dtype != h.dtype else None, *weights, *kept)
        # torch forbids in-place writes, such as a residual sum, to a view that a function returns
        return y.detach()

    @staticmethod
    @_gradient
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, w1, _, w2, _, h, *norm = ctx.saved_tensors
        if ctx.source is not None:
            eps, dtype = ctx.source
            weight, bias, mean, var = norm
            h = OwnBatchNorm.output(h.to(dtype), weight, bias, mean, var, eps)
        # in the dtype that the forward computed in, which autocast may have chosen
        h = h.to(ctx.dtype)
        z = ctx.adapter.down(h) if z is None else z
        w1, w2 = w1.to(ctx.dtype), w2.to(ctx.dtype)
        maps = is_channels_first(ctx.adapter.layout)
        per_map = maps and h.is_contiguous() and _is_large(h)
        moved = maps and not per_map
        add: Callable[..., Tensor]
        if per_map:
            g, x = grad.to(ctx.dtype).flatten(2), h.flatten(2)
            active, before = _through_activation(ctx.adapter, z.flatten(2), torch.matmul(w2.t(), g))
            up, down = torch.bmm(g, active.transpose(1, 2)).sum(0), torch.bmm(before, x.transpose(1, 2)).sum(0)
            offset = before.sum((0, 2))
            add, factors = torch.baddbmm, (w1.t().expand(len(g), -1, -1), before)
        else:
            g, x, inner = (_positions(t, moved) for t in (grad.to(ctx.dtype), h, z))
            active, before = _through_activation(ctx.adapter, inner, g @ w2)
            up, down, offset = g.t() @ active, before.t() @ x, before.sum(0)
            add, factors = torch.addmm, (before, w1)
        of_h = None
        if ctx.needs_input_grad[0]:
            # a gradient that is wider than the products is added in its own dtype
            is_wider = grad.dtype != ctx.dtype
            of_h = add(g, *factors, beta=0 if is_wider else 1)
            of_h = of_h.view(grad.movedim(1, -1).shape).movedim(-1, 1) if moved else of_h.view(grad.shape)
            of_h = of_h.to(grad.dtype).add_(grad) if is_wider else of_h
        return of_h, None, None, None, down, offset, up[:, :-1], up[:, -1]


def _positions(x: Tensor, moved: bool) -> Tensor:
    """``(positions, channels)``; with ``moved`` the channels are on axis 1."""
    return (x.movedim(1, -1) if moved else x).reshape(-1, x.shape[1 if moved else -1])


def _through_activation(adapter: BottleneckAdapter, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(φ(z), 1), whose product with the gradient of the output is that of W2 and b2, and the gradient of z."""
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        active = adapter.activation(leaf)
    (before,) = torch.autograd.grad(active, leaf, grad)
    return torch.cat([active.detach(), torch.ones_like(z.narrow(1, 0, 1))], 1), before


def _is_large(x: Tensor) -> bool:
    """Whether one matrix product per map is faster than one of all positions: from about 12×12 positions up."""
    return x.shape[2:].numel() >= 128


def _products(grad: Tensor, weight: Tensor) -> Tensor:
    """Wᵀ·g at every position, in the memory format of ``grad``, for the kernel of a 1×1 convolution."""
    kernel = weight.flatten(1)
    if format_of(grad) is torch.channels_last:
        return (grad.permute(0, 2, 3, 1) @ kernel).permute(0, 3, 1, 2)
    return torch.matmul(kernel.t(), grad.flatten(2)).view(len(grad), kernel.shape[1], *grad.shape[2:])


def _spread(x: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Zeros of a shape with ``x`` at every ``stride``-th position."""
    if x.shape == shape:
        return x
    whole = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=format_of(x))
    whole[:, :, :: stride[0], :: stride[1]] = x
    return whole
