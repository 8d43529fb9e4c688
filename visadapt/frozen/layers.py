"""Lean classes of a frozen backbone's layers: the same layers, computing by functions that remember less."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.folding import carried
from visadapt.frozen.functions import FrozenConv, IndexedMaxPool, MaskedReLU
from visadapt.host import CHILD, LEAN, Maker, Parts, cached, is_stateful, subclass
from visadapt.registry import Registry


@dataclass
class Pair:
    """A conv and the BatchNorm that alone takes its output, folded into it as long as the task owns neither.

    Attributes:
        registry: of the model, to ask which task is meant.
        conv: the conv.
        norm: the norm.
        folded: W' = s·W and b' = s·b + t, made at the first use and again after the norm or conv was changed or moved.
    """

    registry: Registry
    conv: nn.Conv2d
    norm: _BatchNorm
    folded: tuple[Any, Tensor, Tensor] | None = field(default=None, repr=False)

    def active(self) -> bool:
        """Whether the folded conv stands for both here and now."""
        if torch.compiler.is_compiling():
            # the compiler fuses a norm with what is around it, and decides by itself what to keep
            return False
        task = self.registry.current()
        if task is None:
            return True
        if not isinstance(task, str):
            return False
        return not _owns(self.conv, task) and not _owns(self.norm, task, "norm")

    def weights(self) -> tuple[Tensor, Tensor]:
        """The folded kernel and bias."""
        norm, conv = self.norm, self.conv
        tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.weight, conv.bias]
        now = tuple((t.data_ptr(), t._version) for t in tensors if t is not None)
        if self.folded is None or self.folded[0] != now:
            with torch.no_grad():
                mean, var = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
                scale = torch.rsqrt(var.double() + norm.eps)
                scale = scale if norm.weight is None else scale * norm.weight.double()
                shift = (0 if conv.bias is None else conv.bias.double()) - mean.double()
                shift = shift * scale + (0 if norm.bias is None else norm.bias.double())
                weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
                kernel = weight.to(conv.weight.dtype, memory_format=torch.preserve_format)
                self.folded = (now, kernel, shift.to(conv.weight.dtype))
        assert self.folded is not None
        return self.folded[1], self.folded[2]


def _owns(module: nn.Module, task: str, part: str | None = None) -> bool:
    """Whether a task has parts at a module, or this very part."""
    parts = module._modules.get(CHILD)
    if not isinstance(parts, Parts) or task not in parts:
        return False
    return part is None or part in cast("nn.ModuleDict", parts[task])


def _remembers(x: Tensor) -> bool:
    """Whether autograd (and not a compiler, which is lean by itself) records what happens to ``x``."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cached
def lean_conv(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen conv that keeps no input, with the norm behind it folded in where it may be."""

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        pair: Pair | None = self.__dict__[LEAN]
        weight, bias = (self.weight, self.bias) if pair is None or not pair.active() else pair.weights()
        ordinary = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not ordinary or not _remembers(x) or torch.is_autocast_enabled(x.device.type):
            return cast("Tensor", self._conv_forward(x, weight, bias))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = FrozenConv.apply(x, weight, bias, *settings)
        return out

    return subclass(plain, lean_conv, forward=forward)


@cached
def lean_norm(plain: type[nn.Module]) -> type[nn.Module]:
    """A norm that does nothing where the conv before it has done its work already."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        pair: Pair = self.__dict__[LEAN]
        if not pair.active():
            return cast("Tensor", plain.forward(self, x))
        for module in carried(self):
            x = module(x)
        return x

    return subclass(plain, lean_norm, forward=forward)


@cached
def lean_relu(plain: type[nn.Module]) -> type[nn.Module]:
    """A ReLU that keeps one bit an element."""

    def forward(self: nn.ReLU, x: Tensor) -> Tensor:
        out: Tensor = MaskedReLU.apply(x, self.inplace) if _remembers(x) else nn.ReLU.forward(self, x)
        return out

    return subclass(plain, lean_relu, forward=forward)


@cached
def lean_pool(plain: type[nn.Module]) -> type[nn.Module]:
    """A max-pooling that keeps no input."""

    def forward(self: nn.MaxPool2d, x: Tensor) -> Tensor:
        if not _remembers(x):
            pooled: Tensor = nn.MaxPool2d.forward(self, x)
            return pooled
        settings = [_pair(v) for v in (self.kernel_size, self.stride, self.padding, self.dilation)]
        out: Tensor = IndexedMaxPool.apply(x, (*settings, self.ceil_mode))
        return out

    return subclass(plain, lean_pool, forward=forward)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def maker_for(module: nn.Module, paired: set[nn.Module]) -> Maker | None:
    """What makes a module's lean class, or None if it is as lean as it can be."""
    forward = type(module).forward if CHILD not in module._modules else type(module)._visadapt_base.forward  # type: ignore[attr-defined]
    if forward is nn.Conv2d.forward and isinstance(module, nn.Conv2d):
        return lean_conv
    if module in paired and is_stateful(module):
        return lean_norm
    if forward is nn.ReLU.forward:
        return lean_relu
    if forward is nn.MaxPool2d.forward and isinstance(module, nn.MaxPool2d) and not module.return_indices:
        return lean_pool
    return None
