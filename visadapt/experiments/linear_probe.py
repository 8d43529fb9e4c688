"""The linear probe, on features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import unwrapped
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import registry_of
from visadapt.training import Fit, Recipe, Samples, fit, predict


def fit_head(
    model: nn.Module,
    task: str,
    train: Samples,
    recipe: Recipe,
    *,
    prepare: Callable[[Any], Any] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Fit:
    """Trains a task that owns nothing but a head: one pass of the frozen backbone, then as many of the head as told.

    The backbone is run in eval mode, so there is no dropout in it.

    Args:
        model: an injected model.
        task: that owns a head of one module and nothing else.
        train: with labels.
        recipe: of the head's training.
        prepare: as in :func:`visadapt.training.fit`.
        seed: of the order.
        device: None for where the model is.
        progress: shows a bar on a terminal.

    Raises:
        VisadaptError: the task owns more than a head, or a head of several modules.
    """
    parts = registry_of(model).parts(task)
    if not is_probe(model, task):
        raise VisadaptError(f"task {task!r} is no linear probe: it must own one head and nothing else")
    (path, owned), *_ = parts.items()
    with _inputs_of(unwrapped(model).get_submodule(path)) as features:
        predict(model, task, train, prepare=prepare, device=device)
    return fit(
        owned["head"],
        None,
        Samples(torch.cat(features), train.labels),
        None,
        recipe,
        seed=seed,
        device=device,
        progress=progress,
    )


def is_probe(model: nn.Module, task: str) -> bool:
    """Whether a task owns nothing but a head, and that in one module."""
    parts = registry_of(model).parts(task)
    return len(parts) == 1 and all(list(owned) == ["head"] for owned in parts.values())


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    try:
        yield seen
    finally:
        handle.remove()
