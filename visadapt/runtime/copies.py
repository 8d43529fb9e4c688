"""A task's own copies of the backbone's modules: norms, heads, and what it trains beside them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from visadapt.backbone.facts import Facts
from visadapt.backbone.heads import CLASS_COUNTS, Final, Head
from visadapt.backbone.modules import CHILD, is_stateful, own_parameters, plain_copy, relative, within
from visadapt.backbone.norms import affine_of, is_frozen_norm
from visadapt.backbone.subclass import plain_class
from visadapt.errors import VisadaptError
from visadapt.methods.layers import is_undrawn
from visadapt.runtime.classes import frozen_class, widened_class


def build_head(facts: Facts, head: Head, num_classes: int | None) -> dict[str, nn.Module]:
    """A task's own head, on the backbone's device.

    Args:
        facts: of the backbone.
        head: where its head is, with finals where ``num_classes`` is given.
        num_classes: number of classes of new final layers, or None to start from the backbone's weights.

    Returns:
        The task's module for each of ``head.modules``.
    """
    made: dict[str, nn.Module] = {}
    finals = {final.path: final for final in head.finals} if num_classes is not None else {}
    for path in head.modules:
        fresh = {
            p: _renewed(facts.modules[p], f, num_classes or 0, facts) for p, f in finals.items() if within(p, [path])
        }
        # a layer of a thousand classes is not copied only to be replaced by one of ten
        memo = {id(facts.modules[p]): layer for p, layer in fresh.items()}
        made[path] = own_module(facts, path, memo)
        if fresh:
            _set_width(facts, path, made[path], head.classes(facts.modules), num_classes or 0)
    return made


def own_module(facts: Facts, path: str, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A task's own copy of a module, trainable, in fp32 beside a half-precision backbone.

    Args:
        facts: of the backbone.
        path: of the module.
        memo: modules that replace others inside it, by the ``id`` of the others.
    """
    own = facts.modules[path]
    module = (memo or {}).get(id(own)) or plain_copy(own, memo)
    module = module.to(facts.dtype).requires_grad_(True)
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in own_parameters(own))
    if low and facts.dtype == torch.float32:
        module.__class__ = widened_class(type(module))
    return module


def _set_width(facts: Facts, path: str, module: nn.Module, old: int | None, new: int) -> None:
    """Set the number of classes in a head whose forward reshapes its outputs by it (torchvision's detectors)."""
    for inner, own in facts.modules.items() if old is not None else ():
        counts = [name for name in CLASS_COUNTS if own.__dict__.get(name) == old]
        if counts and within(inner, [path]):
            copied = module.get_submodule(relative(inner, path))
            copied.__dict__.update(dict.fromkeys(counts, new))


def _renewed(old: nn.Module, final: Final, num_classes: int, facts: Facts) -> nn.Module:
    """A new layer of the width for ``num_classes``, with its library's initial values."""
    weight = cast("nn.Parameter", old.weight)
    options: dict[str, Any] = {"bias": old.bias is not None, "device": weight.device, "dtype": facts.dtype}
    width = final.width(num_classes)
    fresh: nn.Module
    if isinstance(old, nn.Linear) and is_undrawn():
        empty = nn.utils.skip_init(nn.Linear, old.in_features, width, **options)  # type: ignore[no-untyped-call]
        return cast("nn.Module", empty)
    if isinstance(old, nn.Linear):
        fresh = nn.Linear(old.in_features, width, **options)
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, kind))
        place = {name: getattr(old, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        fresh = kind(old.in_channels, width, old.kernel_size, **place, **options)  # type: ignore[arg-type]
    if final.std is not None:
        nn.init.normal_(fresh.weight, std=final.std)
        if fresh.bias is not None:
            nn.init.constant_(fresh.bias, final.bias)
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
            "pass norms='affine' or 'frozen'"
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
                # otherwise it would normalise by its input's own statistics, in eval mode too
                clone.__dict__["track_running_stats"] = False
            clone.__class__ = frozen_class(cls)
    return clone
