"""Eval-mode BatchNorm as a scale and a shift, and which conv each one follows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visadapt.backbone.norms import is_batch_norm, is_frozen_norm, scale_and_shift
from visadapt.backbone.operators import CONV_FORWARDS, Conv, as_kernel
from visadapt.backbone.subclass import plain_class
from visadapt.backbone.trace import trace_flow


def pairs(model: nn.Module, example: Any = None) -> list[tuple[str, str]]:
    """Paths of each conv and of the BatchNorm that takes its output, where nothing else does.

    Args:
        model: any model; it is run once on fake tensors.
        example: an input, as :func:`visadapt.sites` takes it; guessed if None.

    Raises:
        VisadaptError: the model does not run on the example.
    """
    flow, _ = trace_flow(model, example)
    consumers = Counter(parent for value in flow.values for parent in value.parents)
    calls = {path: made[0] for path, made in flow.calls_of().items() if len(made) == 1}
    convs = {
        call.output.index: path
        for path, call in calls.items()
        if call.output is not None and plain_class(model.get_submodule(path)).forward in CONV_FORWARDS
    }
    found = []
    for path, call in calls.items():
        norm = model.get_submodule(path)
        if is_foldable(norm) and len(call.inputs) == 1:
            index = call.inputs[0].index
            if index in convs and consumers[index] == 1:
                found.append((convs[index], path))
    return found


@torch.no_grad()
def folded(conv: Conv, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The kernel s·W and the bias s·b + t that do what a conv and the eval-mode norm behind it do."""
    scale, shift = scale_and_shift(norm)
    if conv.bias is not None:
        shift = conv.bias.double() * scale + shift
    kernel = conv.weight.double() * as_kernel(scale[:, None], conv.weight.ndim - 2)
    dtype = conv.weight.dtype
    return kernel.to(dtype, memory_format=torch.preserve_format), shift.to(dtype)


def carried(norm: nn.Module) -> list[nn.Module]:
    """What a norm applies after normalising: drop-out and activation, in timm's norms that carry them."""
    return [child for name, child in norm._modules.items() if name in _CARRIED and not _is_identity(child)]  # type: ignore[misc]


_CARRIED = ("drop", "act")


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm is, in eval mode, a BatchNorm as torch computes it, possibly with an activation behind it."""
    if not is_batch_norm(norm):
        return False
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    carries = all(name in norm._modules for name in _CARRIED)
    return plain_class(norm).forward in known or carries or is_frozen_norm(norm)
