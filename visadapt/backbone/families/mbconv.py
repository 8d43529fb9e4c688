"""Inverted residuals of timm and torchvision: MobileNet, EfficientNet, MNASNet and their kin."""

from __future__ import annotations

from typing import cast

from torch import nn

from visadapt.backbone.families.block import blocks
from visadapt.backbone.families.convs import conv3x3, is_batchnorm, is_depthwise
from visadapt.backbone.modules import own_modules
from visadapt.backbone.site import Site

_TIMM = (
    # first conv of the branch, its last conv, the norm behind that
    ("conv_pw", "conv_pwl", "bn3"),
    ("conv_exp", "conv_pwl", "bn2"),
    ("conv_dw", "conv_pw", "bn2"),
)


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: after the branch's last norm, also in blocks without a shortcut if others of their kind have one."""
    skipping = {type(m) for m in modules.values() if _end(m) and _has_skip(m) and _dense(m) > 1}
    found: list[Site] = []
    for block, module, ends in blocks(modules, lambda m: _end(m) if type(m) in skipping else None):
        conv, norm = map(block.inner, ends)
        channels = cast("nn.Conv2d", modules[conv]).out_channels
        linear = (conv, norm) if is_batchnorm(modules[norm]) else ()
        found += [block.site(norm, "block", channels, "NCHW", module, linear), *conv3x3(block)]
    return found


def _end(block: nn.Module) -> tuple[str, str] | None:
    return _timm(block) or _torchvision(block)


def _has_skip(block: nn.Module) -> bool:
    return bool(getattr(block, "has_skip", getattr(block, "use_res_connect", False)))


def _dense(block: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) and not is_depthwise(m) for m in own_modules(block).values())


def _timm(block: nn.Module) -> tuple[str, str] | None:
    if not hasattr(block, "has_skip"):
        return None
    names = block._modules
    for first, last, norm in _TIMM:
        if first in names and isinstance(names.get(last), nn.Conv2d) and isinstance(names.get(norm), nn.Module):
            # a depthwise conv at the very end comes after the norm
            return None if "conv_dw_end" in names or "layer_scale" in names else (last, norm)
    return None


def _torchvision(block: nn.Module) -> tuple[str, str] | None:
    """The last conv and norm of ``conv`` (MobileNetV2) or ``block`` (V3, EfficientNet), nested as they may be."""
    if not hasattr(block, "use_res_connect"):
        return None
    for name in ("conv", "block"):
        branch = block._modules.get(name)
        if isinstance(branch, nn.Sequential):
            layers = [(path, m) for path, m in own_modules(branch).items() if not set(m._modules) - {"visadapt"}]
            if len(layers) > 1 and isinstance(layers[-2][1], nn.Conv2d) and isinstance(layers[-1][1], nn.BatchNorm2d):
                return f"{name}.{layers[-2][0]}", f"{name}.{layers[-1][0]}"
    return None
