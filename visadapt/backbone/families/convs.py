"""The 3×3 convolutions of a block, which the residual adapters of Rebuffi and others stand at."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.families.block import Block
from visadapt.backbone.modules import joined, last_name, own_modules, parent
from visadapt.backbone.operators import CONVS, operator_of
from visadapt.backbone.site import Site

_ASIDE = ("downsample", "shortcut", "se", "attn", "proj_conv")


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution treats every channel by itself."""
    groups = getattr(module, "groups", 1)
    return bool(groups > 1 and groups == getattr(module, "in_channels", 0))


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm and nothing else: timm's may have an activation inside."""
    inner = list(own_modules(module).values())[1:]
    return isinstance(module, _BatchNorm) and all(isinstance(m, nn.Identity) for m in inner)


def is_conv3x3(module: nn.Module) -> bool:
    """Whether a module is a 3×3 convolution, or its like on volumes (3×3×3; 1×3×3 on frames) and on series.

    On a series every convolution that sees neighbours is: nets of one axis have as many taps in a kernel of 7 or 9.
    """
    if isinstance(module, nn.Conv1d):
        return module.kernel_size[0] > 1
    return isinstance(module, CONVS) and (set(module.kernel_size) == {3} or module.kernel_size == (1, 3, 3))


def conv3x3(block: Block) -> list[Site]:
    """Return the 3×3 convs of a block, grouped ones too but no depthwise ones, without its shortcut and SE."""
    found = []
    for path, module in block.modules.items():
        inner = path.removeprefix(block.path).split(".")
        if is_conv3x3(module) and not is_depthwise(module) and not any(name in _ASIDE for name in inner):
            operator = operator_of(module, path)
            norm = _norm_after(path, block.modules)
            found.append(block.site(path, "conv3x3", operator.outputs, operator.layout, module, (path,), norm))
    return found


def _norm_after(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Path of the BatchNorm of a conv, by the two names there are for it: ``bn2`` of ``conv2``, ``bn`` of ``conv``."""
    name = last_name(path)
    norm = joined(parent(path), name.replace("conv", "bn"))
    return norm if name.startswith("conv") and norm in modules and is_batchnorm(modules[norm]) else ""
