"""Backbones of experiments: those of :mod:`visadapt.data.hub`, and VGG-16 from a file of its convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from visadapt.data.hub import resolve
from visadapt.errors import VisadaptError
from visadapt.optional import require


def network(name: str, **options: Any) -> nn.Module:
    """A pretrained backbone.

    Args:
        name: as :func:`visadapt.inject` takes it, or the path of a ``.safetensors`` file with the convolutions of
            VGG-16 under torchvision's keys, ``features.0.weight`` and so on.
        **options: passed to the builder.

    Raises:
        VisadaptError: there is no such backbone, or the file does not hold VGG-16's convolutions.
    """
    return vgg16(Path(name)) if name.endswith(".safetensors") else resolve(name, **options)


def short_name(name: str) -> str:
    """A backbone's name without where it comes from and which of its weights: ``resnet50``, ``vgg16``, ``minilm``."""
    return "vgg16" if name.endswith(".safetensors") else name.rstrip("/").rpartition("/")[2].partition(".")[0]


def vgg16(file: Path) -> nn.Module:
    """VGG-16's convolutions (Simonyan & Zisserman 2015, arXiv 1409.1556), averaged over the map, in fp32 and eval mode.

    The file has no classifier, and the two hidden layers of the original are 120 million parameters for one size of
    image: here a linear follows the mean of the last map, as in a ResNet. It is untrained; tasks bring their own head.

    Raises:
        VisadaptError: there is no such file, or it does not hold these convolutions.
    """
    models = require("torchvision.models", "VGG-16", "torchvision")
    with torch.device("meta"):
        net: nn.Module = models.vgg16()
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Linear(512, 1000)
    try:
        state = {key: value.float() for key, value in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise VisadaptError(f"cannot read the weights in {file}: {error}") from error
    wanted = [key for key in net.state_dict() if key.startswith("features.")]
    lacking = [key for key in wanted if key not in state]
    if lacking:
        raise VisadaptError(f"{file} holds no convolutions of VGG-16: {lacking[0]} is missing")
    head = {f"classifier.{key}": value for key, value in net.classifier.state_dict().items()}
    net.load_state_dict({**{key: state[key] for key in wanted}, **head}, assign=True)
    return net.eval()
