"""Building blocks of adapters: pointwise projections in any layout, activations, conversion of dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.overrides import handle_torch_function, has_torch_function_unary

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.operators import as_kernel, convolve
from visadapt.backbone.site import is_channels_first, rank_of

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    None: lambda z: z,
}


class Pointwise(nn.Module):
    """y = W·x + b at every position: a 1×1 convolution where channels are on axis 1, a linear where they are last.

    Args:
        inputs: channels in.
        outputs: channels out.
        layout: of its input and output.
        std: of the normal, truncated at two of them, that W is drawn from; 0 for zeros. The bias starts at zero.
        bias: whether there is one.
        stride: of the convolution, one for each axis of positions; 1 if None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layout: str,
        std: float,
        bias: bool = True,
        stride: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.stride = (1,) * rank_of(layout) if stride is None else stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        if std == 0:
            nn.init.zeros_(self.weight)
        else:
            truncated_normal_(self.weight, std)

    def forward(self, x: Tensor) -> Tensor:
        if is_channels_first(self.layout):
            rank = rank_of(self.layout)
            return convolve(rank, x, as_kernel(self.weight, rank), self.bias, self.stride)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, layout={self.layout}, bias={self.bias is not None}"


_UNDRAWN: ContextVar[bool] = ContextVar("visadapt_undrawn", default=False)


@contextmanager
def undrawn() -> Iterator[None]:
    """Skip the random initialisation of modules built in this block; values from a file replace it."""
    token = _UNDRAWN.set(True)
    try:
        yield
    finally:
        _UNDRAWN.reset(token)


def is_undrawn() -> bool:
    """Whether initial values are left undefined here, as `undrawn` asks."""
    return _UNDRAWN.get()


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill with a normal of standard deviation ``std`` truncated at two of them, by inverting its distribution.

    Unlike rejection sampling it takes one random number per element, and a fraction of the time.
    """
    if weight.is_meta or is_undrawn():
        # torch has no kernels for this on the meta device, and interprets each operation in Python
        return
    bound = math.erf(2 / math.sqrt(2))
    weight.uniform_(-bound, bound).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2 * std, 2 * std)


def in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """Convert ``x`` to the dtype of an adapter's parameters, which are fp32 beside a half-precision backbone.

    Under autocast the operators choose the dtype themselves. To a tracer such as torch.fx, whose tensors have no dtype
    yet, this is one call in the graph.
    """
    if has_torch_function_unary(x):
        converted: Tensor = handle_torch_function(in_dtype_of, (x,), weight, x)
        return converted
    if x.dtype == weight.dtype or is_autocast(x.device.type):
        return x
    return x.to(weight.dtype)


def drop_rows(delta: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth: zero a branch for some rows of the batch while training, and scale it up for the others."""
    if not probability or not training:
        return delta
    kept = F.dropout(delta.new_ones(delta.shape[0]), probability)
    return delta * kept.view(-1, *(1,) * (delta.ndim - 1))


def is_output_hooked(module: nn.Module) -> bool:
    """Whether a hook sees the output of a module: its own hooks, or one for all modules."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own."""
    around = is_output_hooked(module) or module._forward_pre_hooks or module_hooks._global_forward_pre_hooks
    return bool(around or "forward" in module.__dict__)


def is_recorded() -> bool:
    """Whether operators are recorded or counted, by a mode or by ``torch.jit.trace``, with sizes as numbers."""
    if torch.compiler.is_dynamo_compiling():
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch._C._get_tracing_state() is not None


def is_dense(x: Tensor) -> bool:
    """Whether all elements are contiguous, with the channels of a map before its positions or behind them."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def as_channels_first(function: Callable[[Tensor], Tensor], x: Tensor, layout: str) -> Tensor:
    """Apply a convolution or a norm to a series, map or volume of any layout."""
    if is_channels_first(layout):
        return function(x)
    return function(x.movedim(-1, 1)).movedim(1, -1)
