"""Norms: which modules of a backbone are norms that a task can own."""

from __future__ import annotations

from torch import nn

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
