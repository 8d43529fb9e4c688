"""Norms in a mixed batch: every sample with its own task's affine part and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.autocast import is_autocast
from visadapt.backbone.batchnorm import carried
from visadapt.backbone.modules import is_stateful, parameter_count
from visadapt.backbone.subclass import plain_class
from visadapt.methods.stacking import Rows
from visadapt.runtime.registry import Parts
from visadapt.runtime.roles import role


def stack_norms(
    host: nn.Module, plain: type[nn.Module], groups: Sequence[nn.ModuleDict], rows: Rows, x: Tensor
) -> Tensor | None:
    """A BatchNorm (in eval mode) or LayerNorm in which every sample has its task's affine part and statistics.

    Args:
        host: the backbone's norm.
        plain: its class.
        groups: the tasks' parts there.
        rows: which group each row of ``x`` belongs to.
        x: the norm's input.

    Returns:
        The output, or None where the norm is of another kind or sees its batch's statistics.
    """
    if not is_stackable(host, plain):
        return None
    norms: list[Any] = []
    for parts in groups:
        own = parts._modules.get("norm")
        if any(part is not own and role(part) in ("instead", "weights") for part in parts.values()):
            return None
        norms.append(host if own is None else own)
    is_layer_norm = plain.forward is nn.LayerNorm.forward
    if any(plain_class(norm) is not plain_class(host) or (norm.training and not is_layer_norm) for norm in norms):
        return None

    def gathered(name: str) -> Tensor | None:
        # not by getattr, which a module answers slowly: there may be thousands to ask
        kind = "_buffers" if name in host._buffers else "_parameters"
        tensors = [norm.__dict__[kind].get(name) for norm in norms]
        return None if tensors[0] is None else rows.gather(tensors)

    return norm_rowwise(host, plain, gathered, x)


def is_stackable(host: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether a module is a norm that `norm_rowwise` computes."""
    return plain.forward is nn.LayerNorm.forward or _is_batch_norm(host, plain)


def norm_rowwise(host: Any, plain: type[nn.Module], own: Callable[[str], Tensor | None], x: Tensor) -> Tensor:
    """A BatchNorm in eval mode or a LayerNorm with each row's tensors.

    Args:
        host: the backbone's norm.
        plain: its class.
        own: gives a parameter or buffer of that name with one entry per row of ``x``; None if the norm has none.
        x: the norm's input.
    """
    return _layer_norm(host, own, x) if plain.forward is nn.LayerNorm.forward else _batch_norm(host, own, x)


def _is_batch_norm(host: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether it is one, with statistics; timm's with an activation behind it is one too."""
    known = plain.forward is _BatchNorm.forward or (
        plain.__name__ == "BatchNormAct2d" and plain.__module__.startswith("timm.")
    )
    # the activation behind it may have weights, which are the task's own then: a PReLU's
    affine = host._parameters.get("weight") is not None
    return known and affine and is_stateful(host) and not any(parameter_count(m) for m in carried(host))


def _batch_norm(host: nn.Module, own: Callable[[str], Tensor | None], x: Tensor) -> Tensor:
    mean, var, weight, bias = (cast("Tensor", own(name)) for name in ("running_mean", "running_var", "weight", "bias"))
    wide = x if x.dtype == weight.dtype or is_autocast(x.device.type) else x.to(weight.dtype)
    eps = cast("float", host.eps)
    if wide.is_contiguous():
        # samples × channels as so many channels: the kernel that a task alone would use, and so its very bits
        flat = wide.view(1, -1, *wide.shape[2:]) if wide.ndim > 2 else wide.view(1, -1)
        stats = (mean.flatten(), var.flatten(), weight.flatten(), bias.flatten())
        y = F.batch_norm(flat, *stats, training=False, eps=eps).view_as(wide)
    else:
        ones = [1] * (x.ndim - 2)
        scale = weight * torch.rsqrt(var + eps)
        shift = torch.addcmul(bias, mean, scale, value=-1)
        y = torch.addcmul(shift.view(*shift.shape, *ones), wide, scale.view(*scale.shape, *ones))
    y = y.to(x.dtype)
    for child in host.children():
        # the dropout and the activation that some norms carry
        y = y if isinstance(child, Parts) else child(y)
    return y


def _layer_norm(host: nn.Module, own: Callable[[str], Tensor | None], x: Tensor) -> Tensor:
    shape = cast("tuple[int, ...]", host.normalized_shape)
    view = (x.shape[0], *[1] * (x.ndim - 1 - len(shape)), *shape)
    weight, bias = own("weight"), own("bias")
    wide = x
    if weight is not None and x.dtype != weight.dtype and not is_autocast(x.device.type):
        wide = x.to(weight.dtype)
    y = F.layer_norm(wide, shape, eps=cast("float", host.eps))
    if weight is None:
        return y.to(x.dtype)
    weight = weight.view(view)
    if bias is None:
        return (y * weight).to(y.dtype if wide is x else x.dtype)
    return torch.addcmul(bias.view(view), y.to(weight.dtype), weight).to(y.dtype if wide is x else x.dtype)
