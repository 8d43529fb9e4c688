"""A task's own copies of the backbone's norms and heads."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import CHILD, is_stateful, own_parameters, plain_copy
from visadapt.backbone.norms import affine_of, is_frozen_norm
from visadapt.backbone.operators import CONVS
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError
from visadapt.runtime.classes import frozen_class, widened_class


def build_head(facts: Facts, num_classes: int | None) -> dict[str, nn.Module]:
    """A task's own head, on the backbone's device.

    Args:
        facts: of a backbone that has a head.
        num_classes: width of a new final layer, or None to start from the backbone's weights.

    Returns:
        The task's module for each of ``head.modules``.
    """
    model, head, dtype = facts.model, facts.head, facts.dtype
    assert head is not None
    made: dict[str, nn.Module] = {}
    for path in head.modules:
        own = facts.modules[path]
        low = any(p.dtype in (torch.float16, torch.bfloat16) for p in own_parameters(own))
        # a head of a thousand classes is not copied only to be replaced by one of ten
        renewed = num_classes is not None and path in head.finals
        module = _renewed(own, cast("int", num_classes), model, dtype) if renewed else plain_copy(own).to(dtype)
        module.requires_grad_(True)
        for last in head.finals if num_classes is not None else ():
            if last.startswith(f"{path}."):
                inner = last.removeprefix(f"{path}.")
                final = module.get_submodule(inner)
                module.set_submodule(inner, _renewed(final, cast("int", num_classes), model, dtype))
        if low and dtype == torch.float32:
            module.__class__ = widened_class(type(module))
        made[path] = module
    return made


def _renewed(final: nn.Module, num_classes: int, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    weight = final.weight
    assert isinstance(weight, nn.Parameter)
    fresh: nn.Module
    if isinstance(final, nn.Linear):
        fresh = nn.Linear(final.in_features, num_classes, final.bias is not None, device=weight.device, dtype=dtype)
    else:
        assert isinstance(final, CONVS)
        conv = CONVS[weight.ndim - 3]
        fresh = conv(final.in_channels, num_classes, 1, bias=final.bias is not None, device=weight.device, dtype=dtype)
    # transformers draws its heads at the scale of its config; torch's own default is as good elsewhere
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    if isinstance(std, float) and math.isfinite(std):
        nn.init.normal_(fresh.weight, std=std)  # type: ignore[arg-type]
        if fresh.bias is not None:
            nn.init.zeros_(fresh.bias)  # type: ignore[arg-type]
    return fresh


def own_copy(norm: nn.Module, full: bool) -> nn.Module:
    """A task's own copy of a norm: the same class, its own affine parameters, and those of an activation it carries.

    Args:
        norm: a module of the backbone, with or without parts. Where its affine part is kept in buffers, as in
            FrozenBatchNorm2d, the copy has parameters of the same names.
        full: whether the copy has running statistics of its own, which move in train mode. Otherwise it reads the
            backbone's, through the very same dict of buffers, so that they follow the backbone to other devices.

    Raises:
        VisadaptError: ``full``, and the norm's statistics never move.
    """
    plain = plain_class(norm)
    affine = affine_of(norm)
    if full and is_frozen_norm(norm):
        raise VisadaptError(
            f"norms='full' gives a task statistics that move in train mode, and those of a {plain.__name__} never do: "
            "say norms='affine' or 'frozen'"
        )
    weight = next(iter(affine.values()))
    low = weight.dtype in (torch.float16, torch.bfloat16)
    cls = widened_class(plain) if low else plain
    clone = cls.__new__(cls)
    nn.Module.__init__(clone)
    own = {k: v for k, v in norm.__dict__.items() if k not in clone.__dict__ or k == "training"}
    clone.__dict__.update(own)
    for name, parameter in (norm._parameters | affine).items():
        # adapters and norms of a task are kept in fp32 beside a half-precision backbone
        value = None if parameter is None else parameter.detach().clone()
        if value is not None:
            value = value.float() if low else value
        clone._parameters[name] = None if value is None else nn.Parameter(value)
    for name, child in norm._modules.items():
        if name != CHILD:
            clone._modules[name] = None if child is None else plain_copy(child).requires_grad_(True)
    clone._non_persistent_buffers_set = set(norm._non_persistent_buffers_set)
    if full or low:
        clone._buffers = {
            k: None if v is None else (v.detach().float() if low and v.is_floating_point() else v.detach().clone())
            for k, v in norm._buffers.items()
            if k not in affine
        }
    else:
        clone._buffers = norm._buffers
    if not full:
        clone._non_persistent_buffers_set.update(clone._buffers)
        if is_stateful(norm):
            if not isinstance(norm, _InstanceNorm):
                # which would normalise by its input's own statistics then, in eval mode too
                clone.__dict__["track_running_stats"] = False
            clone.__class__ = frozen_class(cls)
    return clone
