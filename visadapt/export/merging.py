"""Merging: a task's parts written into the backbone's own weights, exactly, or a refusal with the reason."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visadapt.arguments import takes
from visadapt.backbone.modules import ModelT, drop_hooks, plain_copy, unwrapped
from visadapt.backbone.trace import call, guess_inputs
from visadapt.errors import VisadaptError
from visadapt.export.folding import fold as fold_norms
from visadapt.export.merge_rules import absorb
from visadapt.runtime.registry import Registry, find_registry, registry_of
from visadapt.runtime.root import capture_calls
from visadapt.runtime.selection import bare, using

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05}
"""Largest error, relative to the largest output, that a merge may show on its probe, by the lowest precision in it."""


@takes()
def merge(
    model: ModelT, task: str | None = None, *, inplace: bool = False, fold: bool = False, probe: Any = None
) -> ModelT:
    """A plain backbone that computes what the task does: same class, same keys, no trace of visadapt.

    Exact rules: what acts on weights is written into them; a kernel beside a conv or linear is added to it (a 1×1 at
    the centre tap of a k×k); a linear map M·y + c after a conv or linear gives M·W and M·b + c, and passes through the
    eval-mode norm behind a conv; norms and heads take the place of the backbone's. The merged model is then compared
    with the task on a probe; the largest error is logged (logger ``visadapt.merge``; :func:`merge_error` measures it
    again), and one that is more than rounding is refused.

    Args:
        model: an injected model, in eval mode if the task has statistics of its own.
        task: its name; None for the active one.
        inplace: write into ``model`` itself and take all tasks out of it; :func:`unmerge` undoes that, bit for bit.
            Otherwise ``model`` stays as it is and a copy is merged.
        fold: afterwards fold every eval-mode BatchNorm into the conv before it (see :func:`visadapt.fold`).
        probe: an input to compare on, as :func:`visadapt.sites` takes an example; guessed if None; False for no
            comparison.

    Returns:
        The plain model, in eval mode.

    Raises:
        VisadaptError: something cannot be merged exactly; the site and the reason are named. Nothing was changed then.

    Example:
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
    source = unwrapped(model)
    plain = plain_copy(source)
    absorb(plain, source, registry, name)
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(key in registry.trained)
    _tell_width(plain, registry, name)
    plain.eval()
    if fold:
        plain = fold_norms(plain, example=None if probe is False else probe)
    if probe is not False:
        error, largest = merge_error(source, plain, name, probe)
        low = any(p.dtype in (torch.float16, torch.bfloat16) for p in plain.parameters())
        wide = all(p.dtype == torch.float64 for p in plain.parameters())
        log.info("merged %r: largest error %.2g where outputs reach %.3g", name, error, largest)
        if not error <= TOLERANCE[torch.float16 if low else torch.float64 if wide else torch.float32] * largest:
            raise VisadaptError(
                f"merging {name!r} changed the outputs by {error:.2g} (they reach {largest:.3g}): refused"
            )
    return cast("ModelT", _move_into(source, plain) if inplace else plain)


@torch.no_grad()
@takes()
def merge_error(model: nn.Module, merged: nn.Module, task: str, probe: Any = None) -> tuple[float, float]:
    """The largest absolute difference between a task's outputs and a merged model's, and the largest output.

    Args:
        model: the injected model.
        merged: what :func:`merge` gave.
        task: name of the task.
        probe: an input; images drawn from a normal, or tokens, if None.

    Raises:
        VisadaptError: there is no such task, or the model does not run on a guessed input.
    """
    with bare(model), using(model, task):
        expected, probe = _answer(model, probe)
    found = _tensors(call(merged, probe))
    error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    return error, max(float(t.abs().max()) for t in expected)


def _answer(model: nn.Module, probe: Any) -> tuple[list[Tensor], Any]:
    if probe is not None:
        return _tensors(call(model, probe)), probe
    failure: Exception | None = None
    generator = torch.Generator().manual_seed(0)
    for guess in guess_inputs(model):
        drawn = guess
        if isinstance(guess, Tensor) and guess.is_floating_point():
            drawn = torch.randn(guess.shape, generator=generator).to(guess)
        try:
            return _tensors(call(model, drawn)), drawn
        except Exception as error:
            failure = failure or error
    raise VisadaptError(
        f"{type(model).__name__} does not run on a guessed input ({failure}): pass probe= with one that it takes, "
        "or probe=False to merge without comparing"
    ) from failure


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(t, Tensor)]


def _move_into(model: nn.Module, plain: nn.Module) -> nn.Module:
    drop_hooks(model)
    # all but the hooks, whose handles the user may hold
    kept = _exchange(model, plain.__dict__)
    model.__dict__["_visadapt_merged"] = (type(model), kept)
    model.__class__ = type(plain)
    return model


def _exchange(model: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """Gives a module other attributes, and returns those it had: all but the hooks, whose handles the user may hold."""
    kept = {key: value for key, value in model.__dict__.items() if "_hooks" not in key}
    for key in kept:
        del model.__dict__[key]
    model.__dict__.update({key: value for key, value in attributes.items() if "_hooks" not in key})
    return kept


def unmerge(model: ModelT) -> ModelT:
    """Undo an in-place merge: restore the injected model with all its tasks, bit for bit.

    Args:
        model: what ``merge(model, task, inplace=True)`` gave.

    Returns:
        The same model.

    Raises:
        VisadaptError: the model was not merged in place.

    Example:
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


def _tell_width(plain: nn.Module, registry: Registry, task: str) -> None:
    """Lets the attributes that libraries keep of a head's width follow the merged head."""
    width = registry.task(task).num_classes
    if task in registry.configs:
        plain.__dict__["config"] = copy.deepcopy(registry.configs[task])
    for name in ("num_labels", "num_classes"):
        if width is not None and isinstance(plain.__dict__.get(name), int):
            plain.__dict__[name] = width
