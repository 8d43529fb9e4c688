"""Store a backbone's frozen weights in fewer bytes, and restore the originals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.compact import Compact, Stored, as_parameter, digest_of, mapped, quantised
from visadapt.backbone.modules import joined, own_modules
from visadapt.backbone.operators import CONV_FORWARDS, CONVS, is_linear, operator_of
from visadapt.backbone.subclass import cached, plain_class, subclass
from visadapt.errors import VisadaptError

ORIGINALS = ("disk", "memory", None)
"""Where the original weights of a model are kept."""

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Place = tuple[nn.Module, str]


@cached
def storing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass for a module with a compact weight, whose state dict has the original weight."""

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if not keep_vars:
            for name, parameter in self._parameters.items():
                if isinstance(parameter, Compact) and prefix + name in destination:
                    destination[prefix + name] = parameter.stored.exact()

    return subclass(plain, storing_class, _save_to_state_dict=save)


def is_embedding(module: nn.Module) -> bool:
    """Whether a module only looks up rows of a table."""
    forward = plain_class(module).forward
    return isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, torch's or GPT-2's, as its library computes it."""
    forward = plain_class(module).forward
    return is_linear(module) and (forward is nn.Linear.forward or not isinstance(module, nn.Linear))


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight as inputs × outputs."""
    return not isinstance(module, nn.Linear)


def _names(module: nn.Module, coded: bool) -> tuple[str, ...]:
    """Names of the weights of a module that can be compact."""
    forward = plain_class(module).forward
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    conv = isinstance(module, CONVS) and forward in CONV_FORWARDS
    return ("weight",) if conv or is_plain_linear(module) or (coded and is_embedding(module)) else ()


def _chosen(model: nn.Module, compute: torch.dtype | None, coded: bool) -> dict[nn.Parameter, list[Place]]:
    """Each weight that becomes compact, and all places where it stands."""
    places: dict[nn.Parameter, list[Place]] = {}
    left: set[nn.Parameter] = set()
    for path, module in own_modules(model).items():
        names = _names(module, coded)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.is_meta:
                raise VisadaptError(f"{joined(path, name)} is on the meta device: load the backbone's weights first")
            wide = parameter.dtype in (torch.float32, torch.float64) if not coded else parameter.is_floating_point()
            if type(parameter) is nn.Parameter and name in names and wide and not parameter.requires_grad:
                places.setdefault(parameter, []).append((module, name))
            else:
                left.add(parameter)
    return {parameter: where for parameter, where in places.items() if parameter not in left}


@torch.no_grad()
def compact(model: nn.Module, compute: torch.dtype | None, coded: bool, original: str | None) -> None:
    """Store the weights of convolutions, linears and attention, and with codes those of tables, in fewer bytes.

    Args:
        model: the backbone.
        compute: the dtype of the weights without codes.
        coded: whether weights are kept as 8-bit codes.
        original: where the original weights are kept: ``disk``, ``memory`` or None.

    Raises:
        VisadaptError: there is nothing to make compact, a weight is on the meta device, or the disk is full.
    """
    chosen = _chosen(model, compute, coded)
    if not chosen:
        raise VisadaptError(
            f"{type(model).__name__} has no frozen weights of convolutions or linears in float32 that could be kept in "
            "fewer bytes"
        )
    kept: list[Tensor | None] = [None] * len(chosen)
    if original == "disk":
        kept = [*mapped(list(chosen))]
    elif original == "memory":
        kept = [parameter.detach().cpu().contiguous().clone() for parameter in chosen]
    with torch.inference_mode(False):
        made = [
            (where, _stored(parameter, where[0][0], compute, coded, each))
            for (parameter, where), each in zip(chosen.items(), kept, strict=True)
        ]
    for where, stored in made:
        replacement = as_parameter(stored)
        for module, name in where:
            module._parameters[name] = replacement


def _stored(
    weight: nn.Parameter, module: nn.Module, compute: torch.dtype | None, coded: bool, original: Tensor | None
) -> Stored:
    own = weight.detach()
    if not coded:
        assert compute is not None
        return Stored(own.to(compute), None, own.dtype, original, digest_of(own))
    transposed = is_linear(module) and operator_of(module, "").transposed
    codes, scale = quantised(own, 1 if transposed else 0)
    return Stored(codes, scale, own.dtype, original, digest_of(own))


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Compact]]:
    """Every place of a compact weight: path, module, name and weight."""
    for path, module in own_modules(model).items():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Compact):
                yield joined(path, name), module, name, parameter


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Restore the original weights of a backbone.

    Raises:
        VisadaptError: they were not kept. Nothing was changed then.
    """
    found = list(places(model))
    lost = next((path for path, _, _, weight in found if weight.stored.original is None), None)
    if lost is not None:
        raise VisadaptError(
            f"the original of {lost} was not kept (original=None, or a conversion of the dtype since): load the "
            "backbone's weights again"
        )
    made: dict[Stored, nn.Parameter] = {}
    with torch.inference_mode(False):
        for _, _, _, weight in found:
            if weight.stored not in made:
                made[weight.stored] = nn.Parameter(weight.stored.exact(), requires_grad=False)
    for _, module, name, weight in found:
        module._parameters[name] = made[weight.stored]
