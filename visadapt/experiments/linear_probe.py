"""The linear probe, trained on cached features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.backbone.modules import unwrapped
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import registry_of
from visadapt.training import Fit, Recipe, Samples, evaluate, fit, predict
from visadapt.training.head_first import Unsuited, fit_linear
from visadapt.training.losses import Objective
from visadapt.training.scoring import Metric


def fit_head(
    model: nn.Module,
    task: str,
    train: Samples,
    recipe: Recipe,
    *,
    validation: Samples | None = None,
    metric: Metric = "accuracy",
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
        validation: labelled samples; with a recipe that is ``head_first``, the head starts as the solution of the
            regularised problem (see `visadapt.training.head_first`), and no epoch is kept that is not better than it.
        metric: score that selects the best epoch.
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
    head = owned["head"]

    def features(samples: Samples) -> Samples:
        with _captured_inputs(unwrapped(model).get_submodule(path)) as inputs:
            predict(model, task, samples, prepare=prepare, device=device, precision="bf16" if recipe.fast else None)
        return Samples(torch.cat(inputs), samples.labels)

    cached = features(train)
    held_out = None if validation is None else features(validation)
    start = None
    if held_out is not None and recipe.head_first and isinstance(head, nn.Linear):
        assert isinstance(cached.inputs, Tensor)
        assert cached.labels is not None
        with suppress(Unsuited):
            fit_linear(head, cached.inputs, cached.labels, Objective(None, recipe.label_smoothing), seed)
            start = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    options: dict[str, Any] = {"metric": metric, "seed": seed, "device": device, "progress": progress}
    before = -math.inf if start is None else _score(head, held_out, metric)
    history = fit(head, None, cached, held_out, recipe, **options)
    if start is not None and history.score is not None and history.score <= before:
        head.load_state_dict(start)
    return history


def _score(head: nn.Module, samples: Samples | None, metric: Metric) -> float:
    (score,) = evaluate(head, None, samples, (metric,)).values()
    return score


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
