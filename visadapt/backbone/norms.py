"""Norms: which modules of a backbone are norms that a task can own, and what a BatchNorm computes in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import is_stateful
from visadapt.backbone.subclass import plain_class

_TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Indexed by the number of position axes, from 1."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with an affine part, torch's own or one that is named like one."""
    own = affine_of(module)
    if not own or any(t.ndim != 1 for t in own.values()):
        return False
    return isinstance(module, _TORCH_NORMS) or "norm" in type(module).__name__.lower()


def affine_of(norm: nn.Module) -> dict[str, Tensor]:
    """The affine part of a norm by name: its own parameters, or buffers where it holds them frozen.

    FrozenBatchNorm2d (torchvision's, detectron2's, DETR's) has no parameter; its weight and bias are buffers.
    """
    own: dict[str, Tensor] = {name: p for name, p in norm._parameters.items() if p is not None}
    if own or not is_stateful(norm):
        return own
    held = {name: norm._buffers.get(name) for name in ("weight", "bias")}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a norm has its affine part in buffers, and statistics that never move."""
    return not any(p is not None for p in module._parameters.values()) and is_norm(module)


def norm_axis(norm: nn.Module, shape: Sequence[int]) -> int | None:
    """The axis of a norm's output that its weight scales; None if the weight's width does not tell."""
    width = len(next(iter(affine_of(norm).values())))
    cls = plain_class(norm)
    if cls.forward is nn.LayerNorm.forward or cls.__name__.endswith("RMSNorm"):
        return len(shape) - 1 if shape[-1] == width else None
    found = [axis for axis, size in enumerate(shape) if size == width]
    return found[0] if len(found) == 1 else None


def find_norms(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The norms among a backbone's modules, by path."""
    return {path: module for path, module in modules.items() if is_norm(module)}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module computes s⊙x + t in eval mode, from statistics and an affine part of the usual names.

    It may carry an activation behind that; see `visadapt.backbone.batchnorm.carried`.
    """
    cls = plain_class(module)
    # the one FrozenBatchNorm2d that keeps its ε where it can be read
    known = (cls.__module__, cls.__name__) == ("torchvision.ops.misc", "FrozenBatchNorm2d")
    return is_stateful(module) and (known or isinstance(module, nn.modules.batchnorm._BatchNorm))


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """s = γ/√(σ²+ε) and t = β − μ·s in fp64: in eval mode a BatchNorm is s⊙x + t."""
    mean, var = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    weight, bias = cast("Tensor | None", norm.weight), cast("Tensor | None", norm.bias)
    scale = torch.rsqrt(var + cast("float", norm.eps))
    scale = scale if weight is None else scale * weight.double()
    return scale, (0 if bias is None else bias.double()) - mean * scale
