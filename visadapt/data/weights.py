"""Bundled pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from visadapt.arguments import takes
from visadapt.data import bundled
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.reading import read_whole

_RESNET50 = "resnet50_imagenet_int8.safetensors"


def resnet50() -> nn.Module:
    """Build torchvision's ResNet-50 with the bundled ImageNet weights, on the CPU in fp32, in eval mode.

    The weights are those of Keras (He et al., https://arxiv.org/abs/1512.03385), stored as int8 with one scale per
    output channel. As in the paper's original form, the stride of each stage sits in the first 1×1 conv rather than in
    the 3×3 conv as in torchvision, and the returned module has its strides there. Inputs are RGB with
    torchvision's ImageNet normalisation (see `normalize`); the head has 1000 classes.

    Returns:
        The network, 25.6 million parameters.

    Raises:
        VisadaptError: torchvision is missing, or the bundled file is damaged.

    Examples:
        >>> from visadapt.data import resnet50
        >>> resnet50().fc.out_features
        1000
    """
    models = require("torchvision.models", "the bundled ResNet-50", "torchvision")
    with torch.device("meta"):  # no default init, which would take longer than reading the weights
        net: nn.Module = models.resnet50()
    for stage in ("layer2", "layer3", "layer4"):
        block: Any = net.get_submodule(f"{stage}.0")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    state = dequantise(bundled.path(_RESNET50))
    for key in net.state_dict():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64, device="cpu")
    net.load_state_dict(state, assign=True)
    return net.eval()


@takes()
def dequantise(file: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file whose int8 tensors ``KEY`` have an fp32 scale per output channel in ``KEY_scale``.

    Args:
        file: the file to read; other tensors are returned unchanged.

    Returns:
        A state dict on the CPU, without the scales.

    Raises:
        VisadaptError: the file is missing or damaged, or an int8 tensor has no scale.

    Examples:
        >>> from visadapt.data import dequantise, path
        >>> weights = dequantise(path("resnet50_imagenet_int8.safetensors"))
        >>> weights["conv1.weight"].dtype, weights["conv1.weight"].shape
        (torch.float32, torch.Size([64, 3, 7, 7]))
    """
    try:
        state = load(read_whole(file))
    except SafetensorError as error:
        raise VisadaptError(f"cannot read the weights in {Path(file).name}: {error}") from error
    for key in [k for k, v in state.items() if v.dtype == torch.int8]:
        scale = state.pop(f"{key}_scale", None)
        if scale is None or scale.shape != state[key].shape[:1]:
            raise VisadaptError(f"{Path(file).name}: int8 tensor {key!r} must have one scale per output channel")
        state[key] = state[key].float().mul_(scale.view(-1, *[1] * (state[key].ndim - 1)))
    return state
