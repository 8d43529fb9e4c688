"""Lean classes of a frozen backbone's layers: the same layers, computing by functions that remember less."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from visadapt.backbone.batchnorm import carried, folded, is_foldable
from visadapt.backbone.modules import LEAN, is_stateful
from visadapt.backbone.operators import CONV_FORWARDS, CONVS, Conv
from visadapt.backbone.subclass import Maker, cached, plain_class, subclass, without
from visadapt.frozen.functions import (
    Activation,
    Bottleneck,
    FrozenConv,
    IndexedMaxPool,
    LayerNorm,
    MaskedDropout,
    MaskedReLU,
    OwnBatchNorm,
)
from visadapt.methods.bottleneck import BottleneckAdapter
from visadapt.methods.layers import is_hooked
from visadapt.runtime.classes import frozen_class
from visadapt.runtime.host import dress, hosting_class
from visadapt.runtime.registry import AUTO, Registry, parts_of
from visadapt.runtime.roles import role


@dataclass
class Lean:
    """How lean a model is; its lean layers share this.

    Attributes:
        keep: the dtype in which floats are kept for the backward pass, None for their own.
    """

    keep: torch.dtype | None = None

    def apply(self, part: nn.Module) -> None:
        """Makes a part of a task lean, and the activation that a norm carries, if they can be."""
        inner = carried(part) if is_foldable(part) else []
        for module, make in ((part, part_maker_for(part)), *((m, maker_for(m, set())) for m in inner)):
            if make is not None:
                module.__dict__[LEAN] = self
                dress(module, make)


@dataclass
class Pair:
    """A conv and the BatchNorm that alone takes its output, folded into it as long as the task owns neither.

    Attributes:
        registry: of the model, to ask which task is meant.
        conv: the conv.
        norm: the norm.
        around: the modules that hold one of them, whose parts may give it other weights.
        folded: W' = s·W and b' = s·b + t, made at the first use and again after the norm or conv was changed or moved.
    """

    registry: Registry
    conv: Conv
    norm: Any
    around: tuple[nn.Module, ...]
    folded: tuple[Any, Tensor, Tensor] | None = field(default=None, repr=False)

    def active(self) -> bool:
        """Whether the folded conv stands for both here and now."""
        if torch.compiler.is_compiling():
            # the compiler fuses a norm with what is around it, and decides by itself what to keep
            return False
        task = self.registry.current()
        tasks = task if isinstance(task, tuple) else (task,)
        return task != AUTO and not any(self._owned(t) for t in set(tasks) if t is not None)

    def _owned(self, task: str) -> bool:
        """Whether a task changes what is folded."""
        return (
            bool(parts_of(self.conv, task))
            or "norm" in parts_of(self.norm, task)
            or any(role(part) == "weights" for module in self.around for part in parts_of(module, task).values())
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        """The folded kernel and bias."""
        norm, conv = self.norm, self.conv
        tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.weight, conv.bias]
        now = tuple((t.data_ptr(), t._version) for t in tensors if t is not None)
        if self.folded is None or self.folded[0] != now:
            self.folded = (now, *folded(conv, norm))
        return self.folded[1], self.folded[2]


def _remembers(x: Tensor) -> bool:
    """Whether autograd (and not a compiler, which is lean by itself) records what happens to ``x``."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cached
def lean_conv(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen conv that keeps no input, with the norm behind it folded in where it may be."""

    def forward(self: Conv, x: Tensor) -> Tensor:
        pair: Pair | Lean = self.__dict__[LEAN]
        folds = isinstance(pair, Pair) and pair.active()
        weight, bias = cast("Pair", pair).weights() if folds else (self.weight, self.bias)
        ordinary = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        # to a task whose own weights these are they are not frozen
        learns = _learns(weight) or (bias is not None and _learns(bias))
        if not ordinary or learns or not _remembers(x):
            return cast("Tensor", self._conv_forward(x, weight, bias))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
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
    """A ReLU or ReLU6 that keeps one bit an element."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _remembers(x):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = MaskedReLU.apply(x, self.inplace, self.max_val if isinstance(self, nn.ReLU6) else None)
        return out

    return subclass(plain, lean_relu, forward=forward)


@cached
def lean_dropout(plain: type[nn.Module]) -> type[nn.Module]:
    """A dropout that keeps one bit an element."""

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        if not (self.training and 0 < self.p < 1 and not self.inplace and _remembers(x)):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = MaskedDropout.apply(x, self.p)
        return out

    return subclass(plain, lean_dropout, forward=forward)


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


@cached
def lean_activation(plain: type[nn.Module]) -> type[nn.Module]:
    """A smooth activation that keeps its input in the dtype that ``lean`` was told."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        keep = _keep(self, x)
        if keep is None or not _remembers(x):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = Activation.apply(x, lambda z: plain.forward(self, z), keep)
        return out

    return subclass(plain, lean_activation, forward=forward)


@cached
def lean_layer_norm(plain: type[nn.Module]) -> type[nn.Module]:
    """A LayerNorm, the backbone's or a task's, that keeps its input in the dtype that ``lean`` was told."""

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        keep = _keep(self, x)
        if keep is None or not (_remembers(x) or _learns(self.weight)) or not _is_plain(x, self.weight):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = LayerNorm.apply(x, self.weight, self.bias, self.normalized_shape, self.eps, keep)
        return out

    return subclass(plain, lean_layer_norm, forward=forward)


@cached
def lean_own_norm(plain: type[nn.Module]) -> type[nn.Module]:
    """A task's BatchNorm on frozen statistics, whose output an adapter behind it need not keep."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _learns(self.weight):
            return cast("Tensor", plain.forward(self, x))
        stats = self.running_mean, self.running_var, self.eps
        out: Tensor = OwnBatchNorm.apply(x, self.weight, self.bias, *stats, _keep(self, x) or x.dtype)
        for module in carried(self):
            out = module(out)
        return out

    return subclass(plain, lean_own_norm, forward=forward)


@cached
def lean_bottleneck(plain: type[nn.Module]) -> type[nn.Module]:
    """An adapter that keeps its input once, or not at all where the norm before it does."""

    def forward(self: BottleneckAdapter, h: Tensor) -> Tensor:
        drops = self.training and self.dropout > 0
        # autograd sees one function, and hooks on the projections inside it would see no gradient
        hooked = is_hooked(self.down) or is_hooked(self.up)
        if drops or hooked or self.depthwise is not None or not _learns(self.down.weight):
            return cast("Tensor", plain.forward(self, h))
        weights = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        out: Tensor = Bottleneck.apply(h, self, _keep(self, h) or h.dtype, *weights)
        return out

    return subclass(plain, lean_bottleneck, forward=forward)


def _keep(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype to keep ``x`` in, if ``lean`` was told one that is narrower than its own."""
    keep: torch.dtype | None = module.__dict__[LEAN].keep
    return keep if keep is not None and keep.itemsize < x.element_size() else None


def _learns(weight: Tensor) -> bool:
    """Whether autograd (and not a compiler) looks for this parameter's gradient."""
    return weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether a function of both computes in the one dtype that they have."""
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def maker_for(module: nn.Module, paired: set[nn.Module]) -> Maker | None:
    """What makes the lean class of a backbone's module, or None if it is as lean as it can be."""
    forward = without(type(module), hosting_class).forward
    if forward in CONV_FORWARDS and isinstance(module, CONVS):
        return lean_conv
    if module in paired and is_stateful(module):
        return lean_norm
    if forward is nn.ReLU.forward or (forward is nn.ReLU6.forward and isinstance(module, nn.ReLU6)):
        return lean_relu
    if forward is nn.Dropout.forward:
        return lean_dropout
    if forward is nn.MaxPool2d.forward and isinstance(module, nn.MaxPool2d) and not module.return_indices:
        return lean_pool
    if forward is nn.LayerNorm.forward:
        return lean_layer_norm
    smooth = any(name in type(module).__name__ for name in ("GELU", "SiLU")) and not getattr(module, "inplace", False)
    if smooth and not module._parameters and not module._modules:
        return lean_activation
    return None


def part_maker_for(part: nn.Module) -> Maker | None:
    """The same for a part of a task."""
    if type(part) is BottleneckAdapter:
        return lean_bottleneck
    if type(part) is frozen_class(plain_class(part)) and is_foldable(part):
        return lean_own_norm
    if type(part).forward is nn.LayerNorm.forward:
        return lean_layer_norm
    return None


MAKERS = (
    lean_conv,
    lean_norm,
    lean_relu,
    lean_dropout,
    lean_pool,
    lean_activation,
    lean_layer_norm,
    lean_own_norm,
    lean_bottleneck,
)
"""All makers of lean classes."""
