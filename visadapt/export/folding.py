"""Folding: eval-mode BatchNorms written into the convs before them, for inference."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import nn

from visadapt.backbone.batchnorm import carried, find_pairs, folded
from visadapt.backbone.operators import Conv
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import find_registry


def fold(model: nn.Module, *, example: Any = None) -> nn.Module:
    """Fold every BatchNorm that alone follows a conv into it: W' = s·W, b' = s·b + t with s = γ/√(σ²+ε), t = β − μ·s.

    Args:
        model: a plain model in eval mode, such as `visadapt.merge` gives; changed in place.
        example: an input to find the pairs with, as `visadapt.sites` takes it; guessed if None.

    Returns:
        The same model; the folded norms have become identities (or the activation that they carried).

    Raises:
        VisadaptError: the model is injected or in train mode, or does not run on the example.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> expected = backbone.eval()(images)
        >>> torch.allclose(visadapt.fold(backbone)(images), expected, atol=1e-4)
        True
    """
    if find_registry(model) is not None:
        raise VisadaptError("this model has tasks: merge one first (merge(model, task, fold=True))")
    if model.training:
        raise VisadaptError("folding takes the running statistics as they are: call eval() first")
    held = (tensor for m in model.modules() for tensor in (*m._parameters.values(), *m._buffers.values()))
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in held if tensor is not None)
    for conv_path, norm_path in find_pairs(model, example):
        conv, norm = cast("Conv", model.get_submodule(conv_path)), model.get_submodule(norm_path)
        # a weight that is tied must not change
        if not norm.training and uses[conv.weight.untyped_storage().data_ptr()] == 1 and _fold_pair(conv, norm):
            model.set_submodule(norm_path, _rest(norm))
    return model


@torch.no_grad()
def _fold_pair(conv: Conv, norm: nn.Module) -> bool:
    """Fold a norm into the conv before it, unless that overflows the conv's dtype."""
    kernel, bias = folded(conv, norm)
    if not kernel.isfinite().all() or not bias.isfinite().all():
        return False
    conv.weight.copy_(kernel)
    conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    return True


def _rest(norm: nn.Module) -> nn.Module:
    """What remains of a norm that is folded."""
    after = carried(norm)
    return nn.Sequential(*after) if after else nn.Identity()
