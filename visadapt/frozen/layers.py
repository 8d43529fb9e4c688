"""Lean classes of a frozen backbone's layers: the same layers, with autograd functions that keep less."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.batchnorm import carried, is_foldable
from visadapt.backbone.compact import Compact
from visadapt.backbone.modules import LEAN
from visadapt.backbone.operators import CONV_FORWARDS, CONVS, Conv
from visadapt.backbone.subclass import Maker, cached, plain_class, subclass, without
from visadapt.backbone.tracing import is_tracing
from visadapt.frozen.checksums import Checksums
from visadapt.frozen.compacting import is_embedding, is_plain_linear, is_transposed, storing_class
from visadapt.frozen.folds import FOLDED, Folds, Pair, lean_root
from visadapt.frozen.functions import (
    Activation,
    Bottleneck,
    FrozenConv,
    FrozenLinear,
    FrozenNorm,
    IndexedMaxPool,
    LayerNorm,
    MaskedDropout,
    MaskedReLU,
    NormInput,
    OwnBatchNorm,
    version,
)
from visadapt.frozen.precision import begin
from visadapt.methods.bottleneck import BottleneckAdapter
from visadapt.methods.layers import is_output_hooked
from visadapt.runtime.classes import frozen_class
from visadapt.runtime.host import dress, hosting_class

SOURCE = "_visadapt_source"
"""Attribute of a norm's output: what it can be recomputed from, and its version then."""


@dataclass
class Lean:
    """Settings of a lean model, shared by its lean layers.

    Attributes:
        keep: the dtype in which floats are kept for the backward pass, None for their own.
        compute: the dtype in which frozen layers compute, None for that of their inputs.
        weights: how their weights are kept: ``int8``, or None for a dtype.
        folds: which norms are folded into which convs.
        begun: checksums of the tasks' tensors when they came to a model with such weights, by task.
    """

    keep: torch.dtype | None = None
    compute: torch.dtype | None = None
    weights: str | None = None
    folds: Folds = field(kw_only=True)
    begun: dict[str, Checksums] = field(default_factory=dict)

    @property
    def is_compact(self) -> bool:
        """Whether weights are kept in fewer bytes than the backbone's own."""
        return self.compute is not None or self.weights is not None

    @property
    def told(self) -> str:
        """In which precision frozen layers hold their weights and compute; empty if in the model's own."""
        kept = [] if self.weights is None else [f"weights kept as {self.weights}"]
        computed = [] if self.compute is None else [f"computing in {str(self.compute).removeprefix('torch.')}"]
        return ", ".join((*kept, *computed))

    def admit(self, task: str) -> None:
        """Record a task that is added to the model."""
        begin(self.folds.registry, [task])

    def apply(self, part: nn.Module) -> None:
        """Make a part of a task lean if possible, and the activation inside a norm."""
        inner = carried(part) if is_foldable(part) else []
        for module, make in ((part, part_maker_for(part)), *((m, maker_for(m)) for m in inner)):
            if make is not None:
                module.__dict__[LEAN] = self
                dress(module, make)


def _remembers(x: Tensor) -> bool:
    """Whether autograd records what happens to ``x``, outside of ``torch.compile``, which saves memory by itself."""
    return x.requires_grad and torch.is_grad_enabled() and not is_tracing()


@cached
def lean_conv(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen conv that keeps no input, with the norm behind it folded in where possible."""

    def forward(self: Conv, x: Tensor) -> Tensor:
        pair: Pair | Lean = self.__dict__[LEAN]
        folded = pair.begin(self, x) if isinstance(pair, Pair) else None
        out = _frozen_conv(self, x, *(folded or (self.weight, self.bias)))
        if folded is not None:
            setattr(out, FOLDED, (pair, version(out)))
        return out

    return subclass(plain, lean_conv, forward=forward)


def _frozen_conv(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ordinary = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and x.ndim == weight.ndim
    # weights that the task owns are not frozen
    learns = _learns(weight) or (bias is not None and _learns(bias))
    if isinstance(weight, Compact) and not is_tracing() and not learns:
        dtype = _computes_in(conv, x)
        given, kernel = x.to(dtype), weight
        if ordinary and _remembers(x):
            return _as_given(FrozenConv.apply(given, kernel, bias, *_geometry(conv)), x)
        shift = None if bias is None else bias.to(dtype)
        return _as_given(conv._conv_forward(given, kernel.dense(dtype), shift), x)
    if not ordinary or learns or not _remembers(x):
        return cast("Tensor", conv._conv_forward(x, weight, bias))
    if is_autocast(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        return cast("Tensor", conv._conv_forward(x, weight, bias))
    out: Tensor = FrozenConv.apply(x, weight, bias, *_geometry(conv))
    return out


def _geometry(conv: Conv) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _computes_in(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a layer with a compact weight computes in."""
    held: Pair | Lean = module.__dict__[LEAN]
    lean: Lean = held.folds.registry.lean if isinstance(held, Pair) else held
    if lean.compute is not None:
        return lean.compute
    autocast = is_autocast(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _as_given(out: Tensor, x: Tensor) -> Tensor:
    """Convert a layer's output to the dtype of its input, except under autocast."""
    return out if is_autocast(x.device.type) else out.to(x.dtype)


@cached
def lean_linear(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen linear whose weight is compact."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not isinstance(weight, Compact) or is_tracing() or (bias is not None and _learns(bias)):
            return cast("Tensor", plain.forward(self, x))
        dtype, transposed = _computes_in(self, x), is_transposed(self)
        if _remembers(x):
            return _as_given(FrozenLinear.apply(x.to(dtype), weight, bias, transposed), x)
        matrix, shift = weight.dense(dtype), None if bias is None else bias.to(dtype)
        return _as_given(F.linear(x.to(dtype), matrix.t() if transposed else matrix, shift), x)

    return subclass(plain, lean_linear, forward=forward)


@cached
def lean_embedding(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen table with rows kept as codes; the rows that are looked up are decoded."""

    def forward(self: Any, index: Tensor) -> Tensor:
        weight = self.weight
        scale = weight.stored.scale if isinstance(weight, Compact) else None
        if scale is None or is_tracing():
            return cast("Tensor", plain.forward(self, index))
        rows = F.embedding(index, weight.stored.values)
        return rows.to(weight.dtype) * F.embedding(index, scale).to(weight.dtype)

    return subclass(plain, lean_embedding, forward=forward)


@cached
def lean_norm(plain: type[nn.Module]) -> type[nn.Module]:
    """A frozen BatchNorm that keeps no input, and does nothing if the conv before it has applied it already."""

    def forward(self: Any, x: Tensor) -> Tensor:
        pair: Pair | Lean = self.__dict__[LEAN]
        if isinstance(pair, Pair) and pair.end(x):
            out = x
        elif self.training or not _remembers(x) or any(p is not None and _learns(p) for p in (self.weight, self.bias)):
            return cast("Tensor", plain.forward(self, x))
        else:
            if isinstance(self, _BatchNorm):
                self._check_input_dim(x)  # type: ignore[no-untyped-call]
            out = FrozenNorm.apply(x, self)
        for module in carried(self):
            out = module(out)
        return out

    return subclass(plain, lean_norm, forward=forward)


@cached
def lean_relu(plain: type[nn.Module]) -> type[nn.Module]:
    """A ReLU or ReLU6 that keeps one bit per element."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _remembers(x):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = MaskedReLU.apply(x, self.inplace, self.max_val if isinstance(self, nn.ReLU6) else None)
        return out

    return subclass(plain, lean_relu, forward=forward)


@cached
def lean_dropout(plain: type[nn.Module]) -> type[nn.Module]:
    """A dropout that keeps one bit per element."""

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
    """A smooth activation that keeps its input in the dtype given to ``lean``."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        keep = _keep(self, x)
        if keep is None or not _remembers(x):
            return cast("Tensor", plain.forward(self, x))
        out: Tensor = Activation.apply(x, lambda z: plain.forward(self, z), keep)
        return out

    return subclass(plain, lean_activation, forward=forward)


@cached
def lean_layer_norm(plain: type[nn.Module]) -> type[nn.Module]:
    """A LayerNorm, the backbone's or a task's, that keeps its input in the dtype given to ``lean``."""

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
        kept = x.detach().to(_keep(self, x) or x.dtype)
        source = NormInput(
            kept, self.weight.detach(), self.bias.detach(), self.running_mean, self.running_var, self.eps, x.dtype
        )
        out: Tensor = OwnBatchNorm.apply(x, self.weight, self.bias, source)
        setattr(out, SOURCE, (source, version(out)))
        for module in carried(self):
            out = module(out)
        return out

    return subclass(plain, lean_own_norm, forward=forward)


@cached
def lean_bottleneck(plain: type[nn.Module]) -> type[nn.Module]:
    """An adapter that keeps its input once, or not at all where the norm before it does."""

    def forward(self: BottleneckAdapter, h: Tensor, fresh: bool = False) -> Tensor:
        # autograd sees one function: hooks on the projections inside it would get no gradient
        hooked = is_output_hooked(self.down) or is_output_hooked(self.up)
        if hooked or not self.is_bare or not _learns(self.down.weight):
            return cast("Tensor", plain.forward(self, h, fresh))
        weights = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        source, written = getattr(h, SOURCE, (None, 0))
        if written != version(h):
            # an in-place activation stands between them
            source = None
        out: Tensor = Bottleneck.apply(h, self, _keep(self, h) or h.dtype, source, *weights)
        return out

    return subclass(plain, lean_bottleneck, forward=forward)


def _keep(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype to keep ``x`` in, if ``lean`` was given one that is narrower than its own."""
    keep: torch.dtype | None = module.__dict__[LEAN].keep
    return keep if keep is not None and keep.itemsize < x.element_size() else None


def _learns(weight: Tensor) -> bool:
    """Whether autograd, outside of ``torch.compile``, computes this parameter's gradient."""
    return weight.requires_grad and torch.is_grad_enabled() and not is_tracing()


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether a function of both computes in their common dtype."""
    return x.dtype == weight.dtype and not is_autocast(x.device.type)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


MAKERS: tuple[Maker, ...] = (
    storing_class,
    lean_conv,
    lean_linear,
    lean_embedding,
    lean_norm,
    lean_relu,
    lean_dropout,
    lean_pool,
    lean_activation,
    lean_layer_norm,
    lean_own_norm,
    lean_bottleneck,
    lean_root,
)
"""The makers of lean classes."""


def maker_for(module: nn.Module) -> Maker | None:
    """The maker of the lean class of a backbone's module, or None if there is nothing to save."""
    forward = without(type(module), hosting_class).forward
    if forward in CONV_FORWARDS and isinstance(module, CONVS):
        return lean_conv
    if is_foldable(module):
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


def compact_maker_for(module: nn.Module) -> Maker | None:
    """The maker of the lean class of a module that is lean only if its weight is compact."""
    if is_plain_linear(module):
        return lean_linear
    return lean_embedding if is_embedding(module) else None


def part_maker_for(part: nn.Module) -> Maker | None:
    """The maker of the lean class of a part of a task, or None."""
    if type(part) is BottleneckAdapter:
        return lean_bottleneck
    if type(part) is frozen_class(plain_class(part)) and is_foldable(part):
        return lean_own_norm
    if type(part).forward is nn.LayerNorm.forward:
        return lean_layer_norm
    return None
