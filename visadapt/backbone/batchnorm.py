"""Eval-mode BatchNorm as a scale and a shift, and which conv each one follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from visadapt.backbone.dataflow import Flow, record
from visadapt.backbone.modules import own_modules
from visadapt.backbone.norms import is_batch_norm, is_frozen_norm, scale_and_shift
from visadapt.backbone.operators import CONV_FORWARDS, Conv, as_kernel
from visadapt.backbone.subclass import plain_class
from visadapt.backbone.trace import call, rehearse


def find_pairs(model: nn.Module, example: Any = None) -> list[tuple[str, str]]:
    """Find each conv whose output goes into a BatchNorm and nowhere else, when the model runs in eval mode.

    A conv or norm with hooks is in no pair, nor one whose weight is computed anew in every forward.

    Args:
        model: any model; it is run once on fake tensors.
        example: an input, as `visadapt.sites` takes it; guessed if None.

    Returns:
        Paths of the conv and of the norm.

    Raises:
        VisadaptError: the model does not run on the example.
    """
    flow, held = rehearse(model, example, _record)[0]
    consumers = Counter(parent for value in flow.values for parent in value.parents)
    once = {path: made[0] for path, made in flow.calls_of().items() if len(made) == 1}
    convs = {
        made.output.index: path
        for path, made in once.items()
        if made.output is not None and _is_plain(model.get_submodule(path))
    }
    found = []
    for path, made in once.items():
        norm = model.get_submodule(path)
        if is_foldable(norm) and not is_watched(norm) and len(made.inputs) == 1:
            index = made.inputs[0].index
            if index in convs and consumers[index] == 1 and index not in held:
                found.append((convs[index], path))
    return found


def _record(model: nn.Module, given: Any) -> tuple[Flow, set[int]]:
    """The dataflow of one forward, and the values that leave it: returned, or stored in an attribute of a module."""
    outs: list[Any] = []
    flow = record(model, own_modules(model), lambda model, given: outs.append(call(model, given)), given)
    attributes = [
        value
        for module in model.modules()
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]
    leaves = tree_leaves([dict(out) if isinstance(out, Mapping) else out for out in [*outs, *attributes]])
    held = {value.index for value in flow.known(leaf for leaf in leaves if isinstance(leaf, Tensor))}
    return flow.forget(), held


def _is_plain(conv: nn.Module) -> bool:
    forward = plain_class(conv).forward in CONV_FORWARDS
    return forward and conv._parameters.get("weight") is not None and not is_watched(conv)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook sees the inputs or outputs of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@torch.no_grad()
def folded(conv: Conv, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold an eval-mode norm into the conv before it: the kernel s·W and the bias s·b + t."""
    scale, shift = scale_and_shift(norm)
    if conv.bias is not None:
        shift = conv.bias.double() * scale + shift
    kernel = conv.weight.double() * as_kernel(scale[:, None], conv.weight.ndim - 2)
    dtype = conv.weight.dtype
    return kernel.to(dtype, memory_format=torch.preserve_format), shift.to(dtype)


def carried(norm: nn.Module) -> list[nn.Module]:
    """The dropout and activation that some of timm's norms apply after normalising."""
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
