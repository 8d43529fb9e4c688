"""Operators: one interface to the convolutions and linears that a kernel can stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from visadapt.backbone.modules import plain_copy
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Indexed by the number of axes that they slide along, from 1."""

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONV_FORWARDS = tuple(conv.forward for conv in CONVS)
"""Forwards that do nothing but convolve."""

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)


def convolve(rank: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any) -> Tensor:
    """Apply ``F.conv1d``, ``conv2d`` or ``conv3d``, by the rank of the positions."""
    return _FUNCTIONS[rank - 1](x, weight, bias, *geometry, **named)


def as_kernel(matrix: Tensor, rank: int) -> Tensor:
    """Return a matrix outputs × inputs as the kernel of a 1×1 convolution of this rank."""
    # by an index, since torch.fx cannot trace the unpacking of a shape
    index: tuple[Any, ...] = (slice(None), slice(None), *(None,) * rank)
    return matrix[index]


@dataclass(frozen=True)
class Operator:
    """The geometry of a host with one weight: a convolution or a linear.

    Attributes:
        inputs: channels in.
        outputs: channels out.
        rank: number of axes that the convolution slides along; 0 for a linear.
        kernel: its size along each of them.
        stride: of the convolution.
        dilation: of the convolution.
        padding: zeros put before each side; None where they depend on the input's size (``same``).
        groups: of the convolution.
        transposed: whether the weight is kept as inputs × outputs, as in GPT-2.
    """

    inputs: int
    outputs: int
    rank: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] | None = ()
    groups: int = 1
    transposed: bool = False

    @property
    def conv(self) -> bool:
        """Whether it is a convolution."""
        return self.rank > 0

    @property
    def layout(self) -> str:
        """Layout of its input and output, as `visadapt.methods.layers.Pointwise` takes it."""
        return ("NLC", "NCL", "NCHW", "NCDHW")[self.rank]

    def pads(self, x: Tensor) -> list[int]:
        """Zeros that the convolution puts before and behind its input, the last axis first, as ``F.pad`` takes them."""
        found: list[int] = []
        for axis in reversed(range(self.rank)):
            size, k = x.shape[2 + axis], self.kernel[axis]
            reach = self.dilation[axis] * (k - 1)
            if self.padding is not None:
                found += [self.padding[axis]] * 2
                continue
            total = max((-(-size // self.stride[axis]) - 1) * self.stride[axis] + reach + 1 - size, 0)
            found += [total // 2, total - total // 2]
        return found

    def at_centre(self, x: Tensor) -> Tensor:
        """The input, cut or padded so that a 1×1 of the same stride reads what the kernel's centre tap reads."""
        if not self.conv or (self.padding is not None and self.centred):
            return x
        pads, shift = self.pads(x), []
        for place, axis in enumerate(reversed(range(self.rank))):
            before, behind = pads[2 * place : 2 * place + 2]
            centre, reach = self.centre[axis], self.dilation[axis]
            shift += [before - reach * centre, behind - reach * (self.kernel[axis] - 1 - centre)]
        return F.pad(x, shift) if any(shift) else x

    @property
    def centre(self) -> tuple[int, ...]:
        """The tap in the middle of the kernel (of an even one, the later of the two)."""
        return tuple(k // 2 for k in self.kernel)

    @property
    def centred(self) -> bool:
        """Whether output position i has its centre tap at input position stride·i."""
        return self.padding is not None and all(
            k % 2 and p == d * (k // 2) for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True)
        )

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        groups: int = 1,
        stride: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Apply another weight with the same geometry, or with another stride."""
        if not self.conv:
            return F.linear(x, weight, bias)
        if self.padding is None:
            return convolve(self.rank, F.pad(x, self.pads(x)), weight, bias, self.stride, 0, self.dilation, groups)
        return convolve(self.rank, x, weight, bias, stride or self.stride, self.padding, self.dilation, groups)


def operator_of(host: nn.Module, what: str) -> Operator:
    """The geometry of a conv or linear.

    Args:
        host: the module.
        what: its path, for messages.

    Raises:
        VisadaptError: it is neither.
    """
    weight = host._parameters.get("weight")
    cls = type(host).__name__
    if isinstance(host, CONVS):
        rank = len(host.kernel_size)
        same = host.padding == "same" or "Same" in plain_class(host).__name__
        given = (0,) * rank if isinstance(host.padding, str) else tuple(map(int, host.padding))
        return Operator(
            host.in_channels,
            host.out_channels,
            rank,
            tuple(map(int, host.kernel_size)),
            tuple(map(int, host.stride)),
            tuple(map(int, host.dilation)),
            None if same else given,
            host.groups,
        )
    if isinstance(host, nn.Linear):
        return Operator(host.in_features, host.out_features, 0)
    if plain_class(host).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return Operator(weight.shape[0], weight.shape[1], 0, transposed=True)
    if isinstance(host, _ConvTransposeNd):
        raise VisadaptError(
            f"{what} is a {cls}: no kernel of an adapter can stand beside a transposed convolution; what acts on its "
            "output, such as Bottleneck or SSF, can stand behind it"
        )
    raise VisadaptError(
        f"{what} is a {cls}, neither a convolution nor a linear: choose such modules with where= "
        "('conv3x3', 'conv', 'linear', or a glob over module names)"
    )


def is_operator(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear."""
    return isinstance(module, CONVS) or is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, torch's or GPT-2's."""
    return isinstance(module, nn.Linear) or plain_class(module).__name__ == "Conv1D"


def plain_operator(host: nn.Module, what: str) -> Operator:
    """The operator of a host that only applies its weight, so that a kernel can be added to the weight.

    Raises:
        VisadaptError: its forward does more, such as standardising the weight, or its weight is not a parameter.
    """
    operator = operator_of(host, what)
    check_weight(host, what)
    if not _only_applies(host, operator):
        raise VisadaptError(f"the forward of {plain_class(host).__name__} does more to its weight than apply it")
    return operator


@torch.no_grad()
def _only_applies(host: nn.Module, operator: Operator) -> bool:
    """Whether a layer's forward is that of its operator; one of another library is tried with a random weight."""
    cls = plain_class(host)
    if cls.forward in (*CONV_FORWARDS, nn.Linear.forward):
        return True
    own = {name: p for name, p in host._parameters.items() if p is not None}
    weight = own["weight"]
    generator = torch.Generator(weight.device).manual_seed(0)

    def drawn(shape: Any) -> Tensor:
        # not around zero, so that a weight that is centred first gives something else
        return torch.rand(shape, generator=generator, device=weight.device, dtype=weight.dtype) - 0.2

    try:
        copied = plain_copy(host, {id(p): nn.Parameter(drawn(p.shape), requires_grad=False) for p in own.values()})
        sides = [d * (k - 1) + 4 for d, k in zip(operator.dilation, operator.kernel, strict=True)]
        x = drawn((2, operator.inputs, *sides))
        given = copied._parameters["weight"]
        assert given is not None
        expected = operator.apply(
            x, given.t() if operator.transposed else given, copied._parameters.get("bias"), operator.groups
        )
        found = cls.forward(copied.eval(), x)
        apart, largest = float((found - expected).abs().max()), float(expected.abs().max())
    except Exception:
        # it takes other arguments, or its weight is packed
        return False
    return apart <= (1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2) * largest


def check_weight(host: nn.Module, what: str) -> None:
    """Refuse a host whose weight is not a parameter of its own.

    Raises:
        VisadaptError: it is computed anew for every forward.
    """
    if host._parameters.get("weight") is None:
        raise VisadaptError(f"{what}: its weight is computed anew in every forward (weight norm, pruning, …)")


def centre_tap(operator: Operator, matrix: Tensor, host: nn.Module) -> Tensor:
    """Return a matrix outputs × inputs as an equivalent kernel in the shape of the host's weight.

    Raises:
        VisadaptError: the host is a grouped convolution, whose kernel has no place for a dense matrix.
    """
    if operator.groups != 1:
        raise VisadaptError(f"a dense 1×1 beside a grouped convolution ({operator.groups} groups) has no kernel there")
    if not operator.conv:
        return matrix.t() if operator.transposed else matrix
    kernel = torch.zeros(*matrix.shape, *operator.kernel, dtype=matrix.dtype, device=matrix.device)
    centre: tuple[slice | int, ...] = (slice(None), slice(None), *operator.centre)
    kernel[centre] = matrix
    return kernel


def rows_of(weight: Tensor, transposed: bool = False) -> Tensor:
    """Reshape a weight to a matrix with one row per output channel."""
    return weight.t() if transposed else weight.flatten(1)
