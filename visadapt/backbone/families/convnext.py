"""ConvNeXt of timm and torchvision."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.families.block import blocks
from visadapt.backbone.families.convs import conv3x3
from visadapt.backbone.site import Site, layout_named


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: the end of each block's one branch, after the LayerScale if there is one."""
    found: list[Site] = []
    for block, module, (host, channels, layout, last) in blocks(modules, lambda m: _timm(m) or _torchvision(m)):
        linear = (block.inner(last),) if last else ()
        found += [block.site(block.inner(host), "block", channels, layout, module, linear), *conv3x3(block)]
    return found


def _timm(block: nn.Module) -> tuple[str, int, str, str] | None:
    names = block._modules
    if not {"conv_dw", "norm", "mlp", "drop_path"} <= set(names) or not hasattr(block, "use_conv_mlp"):
        return None
    last = block.get_submodule("mlp")._modules.get("fc2")
    gamma = getattr(block, "gamma", None)
    if isinstance(gamma, nn.Parameter):
        # LayerScale as a bare parameter: the output of the drop-path behind it is the scaled branch
        return "drop_path", gamma.numel(), "NCHW", ""
    if isinstance(last, nn.Linear):
        # the block's norm and MLP have the channels last
        return "mlp", last.out_features, "NHWC", "mlp.fc2"
    if isinstance(last, nn.Conv2d):
        return "mlp", last.out_channels, "NCHW", "mlp.fc2"
    return None


def _torchvision(block: nn.Module) -> tuple[str, int, str, str] | None:
    scale = block._parameters.get("layer_scale")
    if scale is None or set(block._modules) != {"block", "stochastic_depth"}:
        return None
    # (C, 1, 1): as many ones as there are axes behind the channels'
    layout = layout_named(1, scale.ndim + 1)
    return None if layout is None else ("stochastic_depth", scale.numel(), layout, "")
