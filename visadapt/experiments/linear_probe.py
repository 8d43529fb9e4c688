"""The linear probe, trained on cached features."""

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
    """Train a task that owns only a head: one pass of the frozen backbone, then the head on its cached inputs.

    The backbone runs in eval mode, without dropout.

    Args:
        model: an injected model.
        task: a task that owns one head module and nothing else.
        train: labelled samples.
        recipe: how to train the head.
        prepare: as in `visadapt.training.fit`.
        seed: seed of the order of samples.
        device: device to compute on; None for the model's.
        progress: show a progress bar on a terminal.

    Returns:
        The training history.

    Raises:
        VisadaptError: the task owns more than a head, or a head of several modules.
    """
    parts = registry_of(model).parts(task)
    if not is_probe(model, task):
        raise VisadaptError(f"task {task!r} is not a linear probe: it must own one head and nothing else")
    ((path, owned),) = parts.items()
    with _captured_inputs(unwrapped(model).get_submodule(path)) as features:
        predict(model, task, train, prepare=prepare, device=device, precision="bf16" if recipe.fast else None)
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
    """Whether a task owns one head module and nothing else."""
    parts = registry_of(model).parts(task)
    return len(parts) == 1 and all(list(owned) == ["head"] for owned in parts.values())


@contextmanager
def _captured_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().float().cpu()))
    try:
        yield inputs
    finally:
        handle.remove()
