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
from visadapt.backbone.tracing import is_tracing
from visadapt.methods.stacking import Rows, batch_norm
from visadapt.runtime.registry import Parts


def stack_norms(
    host: nn.Module,
    plain: type[nn.Module],
    looks: Sequence[Any] | None,
    groups: Sequence[nn.ModuleDict],
    rows: Rows,
    x: Tensor,
) -> Tensor | None:
    """A BatchNorm (in eval mode) or LayerNorm in which every sample has its task's affine part and statistics.

    Args:
        host: the backbone's norm.
        plain: its class.
        looks: class, mode and eps of the tasks' own norms; None where tasks change the norm otherwise.
        groups: the tasks' parts there.
        rows: which group each row of ``x`` belongs to.
        x: the norm's input.

    Returns:
        The output, or None where the norm is of another kind or sees its batch's statistics.
    """
    if looks is None or not is_stackable(host, plain):
        return None
    norms: list[Any] = [parts._modules.get("norm", host) for parts in groups]
    cls = plain_class(host)
    trains = _layer_norm_layout(host, plain) is None and (
        host.training
        or any(training for _, training, _ in looks)
        # modes may have changed since the tasks were looked at
        or (is_tracing() and any(norm.training for norm in norms))
    )
    if trains or any(kind is not cls or eps != host.eps for kind, _, eps in looks):
        return None

    # not by getattr, which is slow on a module: there may be thousands
    held = {kind: [norm.__dict__[kind] for norm in norms] for kind in ("_parameters", "_buffers")}

    def gathered(name: str) -> Tensor | None:
        tensors = [own.get(name) for own in held["_buffers" if name in host._buffers else "_parameters"]]
        return None if tensors[0] is None else rows.gather(tensors)

    return norm_rowwise(host, plain, gathered, x)


def is_stackable(host: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether a module is a norm that `norm_rowwise` computes."""
    return _layer_norm_layout(host, plain) is not None or _is_batch_norm(host, plain)


def norm_rowwise(host: Any, plain: type[nn.Module], own: Callable[[str], Tensor | None], x: Tensor) -> Tensor:
    """A BatchNorm in eval mode or a LayerNorm with each row's tensors.

    Args:
        host: the backbone's norm.
        plain: its class.
        own: gives a parameter or buffer of that name with one entry per row of ``x``; None if the norm has none.
        x: the norm's input.
    """
    layout = _layer_norm_layout(host, plain)
    if layout is None:
        return _batch_norm(host, own, x)
    return _layer_norm(host, own, x) if layout == "NLC" else _layer_norm(host, own, x.movedim(1, -1)).movedim(-1, 1)


_LAYER_NORMS = {
    "timm.layers.norm.LayerNorm": "NLC",
    "timm.layers.norm.LayerNorm2d": "NCHW",
    "torchvision.models.convnext.LayerNorm2d": "NCHW",
}
"""The layouts of classes beside torch's own whose forward is only a LayerNorm."""


def _layer_norm_layout(host: nn.Module, plain: type[nn.Module]) -> str | None:
    if plain.forward is nn.LayerNorm.forward:
        return "NLC"
    cls = plain_class(host)
    if plain.forward is not cls.forward or host.__dict__.get("_fast_norm"):
        return None
    return _LAYER_NORMS.get(f"{cls.__module__}.{cls.__name__}")


def _is_batch_norm(host: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether it is a BatchNorm with statistics; timm's with an activation behind it counts too."""
    known = plain.forward is _BatchNorm.forward or (
        plain.__name__ == "BatchNormAct2d" and plain.__module__.startswith("timm.")
    )
    # the activation behind it may have weights of the task's own, as a PReLU has
    affine = host._parameters.get("weight") is not None
    return known and affine and is_stateful(host) and not any(parameter_count(m) for m in carried(host))


def _batch_norm(host: nn.Module, own: Callable[[str], Tensor | None], x: Tensor) -> Tensor:
    y = batch_norm(own, x, cast("float", host.eps))
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
    # the kernel without an affine part takes twice as long as that with one
    one = (wide.new_ones(shape), wide.new_zeros(shape))
    y = F.layer_norm(wide, shape, *one, eps=cast("float", host.eps))
    if weight is None:
        return y.to(x.dtype)
    weight = weight.view(view)
    if bias is None:
        return (y * weight).to(y.dtype if wide is x else x.dtype)
    return torch.addcmul(bias.view(view), y.to(weight.dtype), weight).to(y.dtype if wide is x else x.dtype)
