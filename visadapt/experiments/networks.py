"""Backbones of experiments: those of `visadapt.data.hub`, and VGG-16 from a file of its convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from visadapt.data.hub import resolve
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.reading import read_whole


def network(name: str, **options: Any) -> nn.Module:
    """Load a pretrained backbone.

    Args:
        name: as `visadapt.inject` takes it, or the path of a ``.safetensors`` file with the convolutions of
            VGG-16 under torchvision's keys, ``features.0.weight`` and so on.
        **options: options of the builder.

    Raises:
        VisadaptError: the backbone does not exist, or the file does not contain VGG-16's convolutions.
    """
    return vgg16(Path(name)) if name.endswith(".safetensors") else resolve(name, **options)


def short_name(name: str) -> str:
    """Return a backbone's name without its source and the tag of its weights: ``resnet50``, ``vgg16``, ``minilm``."""
    return "vgg16" if name.endswith(".safetensors") else name.rstrip("/").rpartition("/")[2].partition(".")[0]


def vgg16(file: Path) -> nn.Module:
    """Build VGG-16 (Simonyan & Zisserman 2015, arXiv 1409.1556) from a file of its convolutions, in fp32, eval mode.

    The file has no classifier. The two hidden layers of the original have 120 million parameters and fix the size of
    the images; here one untrained linear layer follows global average pooling, as in a ResNet. Tasks bring their own
    head.

    Raises:
        VisadaptError: the file cannot be read, or does not contain these convolutions.
    """
    models = require("torchvision.models", "VGG-16", "torchvision")
    with torch.device("meta"):
        net: nn.Module = models.vgg16()
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Linear(512, 1000)
    try:
        state = {key: value.float() for key, value in load(read_whole(file)).items()}
    except SafetensorError as error:
        raise VisadaptError(f"cannot read the weights in {file}: {error}") from error
    keys = [key for key in net.state_dict() if key.startswith("features.")]
    missing = [key for key in keys if key not in state]
    if missing:
        raise VisadaptError(f"{file} does not contain the convolutions of VGG-16: {missing[0]} is missing")
    head = {f"classifier.{key}": value for key, value in net.classifier.state_dict().items()}
    net.load_state_dict({**{key: state[key] for key in keys}, **head}, assign=True)
    return net.eval()
