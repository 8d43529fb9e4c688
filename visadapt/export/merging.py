"""Merging: a task's parts written into the backbone's own weights, exactly, or a refusal with the reason."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import nn

from visadapt.arguments import takes
from visadapt.backbone.fingerprint import is_on_meta
from visadapt.backbone.modules import ModelT, drop_hooks, plain_copy, unwrapped
from visadapt.errors import VisadaptError
from visadapt.export.comparing import differences
from visadapt.export.folding import fold as fold_norms
from visadapt.export.given_forwards import check_copied
from visadapt.export.merge_rules import absorb
from visadapt.export.weights import tolerance
from visadapt.runtime.registry import Registry, check_filled, find_registry, registry_of
from visadapt.runtime.root import capture_calls

log = logging.getLogger(__name__)

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Largest error, relative to the outputs, of a merge where the task changes nothing: only folding can have made it. The
outputs of a ResNet-50 in float32 are 3·10⁻⁵ away from those in float64 themselves, on a processor with AVX-512."""

LOW_ROUNDING = 0.02
"""The same for half precision."""


@takes()
def merge(
    model: ModelT, task: str | None = None, *, inplace: bool = False, fold: bool = False, probe: Any = None
) -> ModelT:
    """Merge a task into a plain backbone of the same class, with the same keys, without any trace of visadapt.

    The rules are exact: changes of weights are written into them; a kernel beside a conv or linear is added to it (a
    1×1 at the centre tap of a k×k); a linear map M·y + c after a conv or linear gives M·W and M·b + c, and passes
    through the eval-mode norm behind a conv; norms and heads replace the backbone's. All of it is computed in float64
    and rounded once. The merged model is then compared with the task on a probe; the largest error is logged (logger
    ``visadapt.export.merging``; `merge_error` measures it again). An error that is more than rounding of what the task
    changes is refused: 10⁻³ of the difference between the task and the bare backbone in float32, a tenth in half
    precision. So is a task that changes less than the weights' dtype can hold.

    Args:
        model: an injected model, in eval mode if the task has statistics of its own.
        task: its name; None for the active one.
        inplace: write into ``model`` itself and remove all tasks; `unmerge` undoes that, bit for bit.
            Otherwise ``model`` stays as it is and a copy is merged.
        fold: afterwards fold every eval-mode BatchNorm into the conv before it (see `visadapt.fold`).
        probe: an input to compare on, as `visadapt.sites` takes an example; guessed if None; False for no
            comparison. Then the weights themselves must show that the merge is exact, and a run on a guessed input
            that nothing else computes with them.

    Returns:
        The plain model, in eval mode.

    Raises:
        VisadaptError: something cannot be merged exactly; the site and the reason are named. Nothing was changed then.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.LoRA(r=2), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> any("visadapt" in key for key in plain.state_dict())
        False
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(plain(images), model(images), atol=1e-5)
        True
    """
    registry = registry_of(model)
    name = registry.task(registry.current() if task is None else task).name
    check_filled(registry, [name])
    if registry.lean is not None and registry.lean.is_compact:
        raise VisadaptError(
            f"this model is lean, {registry.lean.told}, and a merge is of its own weights: call visadapt.unlean first"
        )
    source = unwrapped(model)
    if is_on_meta(source):
        raise VisadaptError(f"task {name!r} cannot be merged on the meta device: load the backbone's weights first")
    plain = plain_copy(source)
    check_copied(source, plain)
    example = None if probe is False else probe
    absorb(plain, source, registry, name, example, measured=probe is not False)
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(key in registry.trained)
    _set_width(plain, registry, name)
    plain.eval()
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in plain.parameters())
    if fold:
        if low and probe is False:
            raise VisadaptError("folding rounds to half precision: give probe= an input to measure on, or fold=False")
        plain = fold_norms(plain, example=example)
    if probe is not False:
        _check(source, plain, name, probe, torch.float16 if low else None)
    return cast("ModelT", _move_into(source, plain) if inplace else plain)


def _check(source: nn.Module, plain: nn.Module, name: str, probe: Any, low: torch.dtype | None) -> None:
    """Refuse a merged model that differs from the task by more than rounding, and log the difference."""
    found = differences(source, plain, name, probe)
    outputs = [each for each in found if each.where == "the outputs"]
    error, largest = max(each.error for each in outputs), max(each.size for each in outputs)
    log.info("merged %r: largest error %.2g where outputs reach %.3g", name, error, largest)
    for each in found:
        dtype = low or each.dtype
        share = tolerance(dtype)
        # the outputs of a head of the task's own have no counterpart in the backbone
        change = each.size if each.change is None else each.change
        most = share * change if change else ROUNDING.get(dtype, LOW_ROUNDING) * each.size
        if not each.error <= most:
            relative = f", {each.error / change:.1%} of what the task changes there" if change else ""
            raise VisadaptError(
                f"merging {name!r} changed {each.where} by {each.error:.2g}{relative} (they reach {each.size:.3g}): "
                "refused"
            )


@takes()
def merge_error(model: nn.Module, merged: nn.Module, task: str, probe: Any = None) -> tuple[float, float]:
    """The largest absolute difference between a task's outputs and a merged model's, and the largest output.

    Args:
        model: the injected model.
        merged: the result of `merge`.
        task: name of the task.
        probe: an input; images drawn from a normal, or random tokens, if None.

    Returns:
        Both as floats, in the units of the model's outputs.

    Raises:
        VisadaptError: the model has no such task, or it does not run on a guessed input.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.LoRA(r=4), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> difference, largest = visadapt.merge_error(model, plain, "flowers")
        >>> difference <= 1e-4 * largest
        True
    """
    outputs = [each for each in differences(model, merged, task, probe) if each.where == "the outputs"]
    return max(each.error for each in outputs), max(each.size for each in outputs)


def _move_into(model: nn.Module, plain: nn.Module) -> nn.Module:
    drop_hooks(model)
    # all but the hooks, whose handles the user may hold
    kept = _exchange(model, plain.__dict__)
    model.__dict__["_visadapt_merged"] = (type(model), kept)
    model.__class__ = type(plain)
    return model


def _exchange(model: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """Exchange the attributes of a module except its hooks, whose handles the user may hold; return the old ones."""
    kept = {key: value for key, value in model.__dict__.items() if "_hooks" not in key}
    for key in kept:
        del model.__dict__[key]
    model.__dict__.update({key: value for key, value in attributes.items() if "_hooks" not in key})
    return kept


def unmerge(model: ModelT) -> ModelT:
    """Undo an in-place merge: restore the injected model with all its tasks, bit for bit.

    Args:
        model: the result of ``merge(model, task, inplace=True)``.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was not merged in place.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.LoRA(r=2), task="flowers", num_classes=3).eval()
        >>> model = visadapt.merge(model, "flowers", inplace=True)
        >>> visadapt.tasks(model)
        {}
        >>> list(visadapt.tasks(visadapt.unmerge(model)))
        ['flowers']
    """
    registry = find_registry(model)
    if "_visadapt_merged" not in model.__dict__:
        raise VisadaptError(f"this {type(model).__name__} was not merged in place: there is nothing to unmerge")
    if registry is not None:
        raise VisadaptError("this model was given new tasks after the merge: visadapt.eject them first")
    cls, kept = model.__dict__["_visadapt_merged"]
    _exchange(model, kept)
    model.__class__ = cls
    capture_calls(model)
    return model


def _set_width(plain: nn.Module, registry: Registry, task: str) -> None:
    """Set the attributes in which libraries keep the width of a head."""
    width = registry.task(task).num_classes
    if task in registry.configs:
        plain.__dict__["config"] = copy.deepcopy(registry.configs[task])
    for name in ("num_labels", "num_classes"):
        if width is not None and isinstance(plain.__dict__.get(name), int):
            plain.__dict__[name] = width
