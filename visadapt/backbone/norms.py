"""Norms: which modules of a backbone are norms that a task can own, and what a BatchNorm computes in eval mode."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

_TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with an affine part, torch's own or another library's of that name."""
    own = [p for p in module._parameters.values() if p is not None]
    if not own or any(p.ndim != 1 for p in own):
        return False
    return isinstance(module, _TORCH_NORMS) or "norm" in type(module).__name__.lower()


def find_norms(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The norms among a backbone's modules, by path."""
    return {path: module for path, module in modules.items() if is_norm(module)}


def scale_and_shift(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """s = γ/√(σ²+ε) and t = β − μ·s in fp64: in eval mode a BatchNorm is s⊙x + t."""
    mean, var = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    return scale, (0 if norm.bias is None else norm.bias.double()) - mean * scale
