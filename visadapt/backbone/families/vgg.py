"""VGG with and without BatchNorm, of torchvision and timm, and AlexNet: plain chains of convs and activations."""

from __future__ import annotations

from torch import nn

from visadapt.backbone.modules import joined, parameter_count
from visadapt.backbone.site import Site


def find(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """``block``: after each conv's activation; ``conv3x3``: each 3×3 conv. Stages are separated by poolings."""
    found: list[Site] = []
    for path, features in modules.items():
        if not isinstance(features, nn.Sequential) or not _is_chain(features):
            continue
        conv, depth, stage = None, 0, 1
        layers = list(features.named_children())
        for i, (name, layer) in enumerate(layers):
            host = joined(path, name)
            if isinstance(layer, nn.Conv2d):
                conv = layer
                if layer.kernel_size == (3, 3):
                    size = parameter_count(layer)
                    following, after = layers[i + 1]
                    norm = joined(path, following) if isinstance(after, nn.BatchNorm2d) else ""
                    found.append(
                        Site(
                            host,
                            "conv3x3",
                            layer.out_channels,
                            "NCHW",
                            depth,
                            stage=f"stage{stage}",
                            block=host,
                            adapts=size,
                            linear=(host,),
                            norm=norm,
                        )
                    )
            elif isinstance(layer, nn.MaxPool2d):
                stage += 1
            elif isinstance(layer, nn.ReLU) and conv is not None:
                size = parameter_count(conv)
                found.append(Site(host, "block", conv.out_channels, "NCHW", depth, f"stage{stage}", host, size))
                depth += 1
    return found


def _is_chain(features: nn.Sequential) -> bool:
    known = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.BatchNorm2d)
    convs = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    # fewer convs form a stem
    return len(convs) >= 5 and all(isinstance(layer, known) for layer in features)
