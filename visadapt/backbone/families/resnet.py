"""ResNets of torchvision, timm and their kin: BasicBlock and Bottleneck, ResNeXt, SE, antialiased."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.families.block import blocks
from visadapt.backbone.families.convs import conv3x3
from visadapt.backbone.operators import CONVS, operator_of
from visadapt.backbone.site import Site


def last_norm(block: nn.Module) -> str | None:
    """Name of the norm that ends the residual branch of a block, or None for other blocks."""
    names = block._modules
    if "downsample" not in names and not hasattr(block, "downsample"):
        return None
    for number in ("3", "2"):
        if isinstance(names.get(f"conv{number}"), CONVS) and isinstance(names.get(f"bn{number}"), nn.Module):
            return f"bn{number}"
    return None


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: after the branch's last norm and SE, before drop-path and the add; ``conv3x3``: its 3×3 convs."""
    found: list[Site] = []
    for block, module, last in blocks(modules, last_norm):
        conv, norm = block.inner(last.replace("bn", "conv")), block.inner(last)
        # squeeze-and-excitation rescales the branch after its last norm: the adapter comes after both
        end = next((se for se in ("se", "se_module") if isinstance(module._modules.get(se), nn.Module)), last)
        # the convolution says where the channels are and how many, whatever the norm behind it is
        operator = operator_of(modules[conv], conv)
        composed = (conv,) if isinstance(modules[norm], nn.Identity) else (conv, norm)
        linear = composed if end == last else ()
        found += conv3x3(block)
        found.append(block.site(block.inner(end), "block", operator.outputs, operator.layout, module, linear))
    return found
