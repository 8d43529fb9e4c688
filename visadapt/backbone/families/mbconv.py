"""Inverted residuals of timm and torchvision: MobileNet, EfficientNet, MNASNet and their kin."""

from __future__ import annotations

from typing import cast

from torch import nn

from visadapt.backbone.families.convs import conv3x3, is_batchnorm, is_depthwise
from visadapt.backbone.modules import own_modules, parameter_count
from visadapt.backbone.site import Site

_TIMM = (
    # first conv of the branch, its last conv, the norm behind that
    ("conv_pw", "conv_pwl", "bn3"),
    ("conv_exp", "conv_pwl", "bn2"),
    ("conv_dw", "conv_pw", "bn2"),
)


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: after the branch's last norm, also in blocks without a shortcut if others of their kind have one."""
    ends: dict[str, tuple[str, str]] = {}
    for path, block in modules.items():
        end = _timm(block) or _torchvision(block)
        if end is not None:
            ends[path] = end
    skipping = {type(modules[path]) for path in ends if _has_skip(modules[path]) and _dense(modules[path]) > 1}
    found: list[Site] = []
    depth = 0
    for path, (conv, norm) in ends.items():
        block = modules[path]
        if type(block) not in skipping:
            continue
        channels = cast("nn.Conv2d", block.get_submodule(conv)).out_channels
        stage = path.rpartition(".")[0]
        linear = (f"{path}.{conv}", f"{path}.{norm}") if is_batchnorm(block.get_submodule(norm)) else ()
        size = parameter_count(block)
        found.append(Site(f"{path}.{norm}", "block", channels, "NCHW", depth, stage, path, size, linear))
        inside = {p: m for p, m in modules.items() if p.startswith(f"{path}.")}
        found += conv3x3(inside, depth, stage, path)
        depth += 1
    return found


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
