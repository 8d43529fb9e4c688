"""DenseNets of timm and torchvision: no sums: the output of each layer is concatenated to its input."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.families.block import blocks
from visadapt.backbone.families.convs import conv3x3
from visadapt.backbone.site import Site


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: the output of each dense layer, before it is concatenated."""
    found: list[Site] = []
    for block, layer, conv in blocks(modules, _last_conv):
        # the layer returns its conv's output as it is, unless it drops some of it
        linear = (block.inner("conv2"),)
        found += [block.site(block.path, "block", conv.out_channels, "NCHW", layer, linear), *conv3x3(block)]
    return found


def _last_conv(layer: nn.Module) -> nn.Conv2d | None:
    conv = layer._modules.get("conv2")
    dense = hasattr(layer, "memory_efficient") or hasattr(layer, "grad_checkpointing")
    is_last = dense and {"norm1", "conv1", "norm2"} <= set(layer._modules) and isinstance(conv, nn.Conv2d)
    return conv if is_last and isinstance(conv, nn.Conv2d) else None
