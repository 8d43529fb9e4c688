"""DenseNets of timm and torchvision: no sums; what each layer adds is concatenated to what there was."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.families.convs import conv3x3
from visadapt.backbone.modules import parameter_count
from visadapt.backbone.site import Site


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: the output of each dense layer, before it is concatenated."""
    found: list[Site] = []
    depth = 0
    for path, layer in modules.items():
        conv = layer._modules.get("conv2")
        if not {"norm1", "conv1", "norm2"} <= set(layer._modules) or not isinstance(conv, nn.Conv2d):
            continue
        if not hasattr(layer, "memory_efficient") and not hasattr(layer, "grad_checkpointing"):
            continue
        stage = path.rpartition(".")[0]
        size = parameter_count(layer)
        # the layer returns its conv's output as it is, unless it drops some of it
        found.append(Site(path, "block", conv.out_channels, "NCHW", depth, stage, path, size, (f"{path}.conv2",)))
        inside = {p: m for p, m in modules.items() if p.startswith(f"{path}.")}
        found += conv3x3(inside, depth, stage, path)
        depth += 1
    return found
