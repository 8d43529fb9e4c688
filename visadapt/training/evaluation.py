"""Logits and metrics of a task on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.data.samples import ready
from visadapt.training.batches import Batches
from visadapt.training.engine import Engine, LogitsModel
from visadapt.training.losses import Diverged, check_labels
from visadapt.training.metrics import METRICS, check_metric
from visadapt.training.target import Target, target_of

Prepare = Callable[[Any], Any]


def evaluate(
    model: nn.Module,
    task: str | None,
    data: Any,
    metrics: Sequence[str] = ("accuracy", "loss"),
    *,
    prepare: Prepare | None = None,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> dict[str, float]:
    """Compute metrics of a task in eval mode; the model's mode is restored.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: inputs and labels, in any form that :func:`fit` takes.
        metrics: names; see ``METRICS``.
        prepare: as in :func:`fit`.
        batch_size: samples per forward pass, for data that is not batched already.
        device: None for the model's own device.
        precision: as in :func:`fit`.

    Returns:
        The metrics by name.

    Raises:
        VisadaptError: the task, metric or device does not exist; the data is empty or has no labels; a logit is not
            finite.

    Example:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> sorted(evaluate(model, "flowers", (images, labels)))
        ['accuracy', 'loss']
    """
    batches = Batches(data, batch_size, "evaluation")
    target = _target(model, task)
    for name in metrics:
        check_metric(name, batches.labels, None if target is None else target.classes)
    logits_model = LogitsModel(model, prepare or ready, Engine(model, device, precision))
    logits, labels = logits_and_labels(logits_model, target, batches)
    assert labels is not None
    for name in metrics:
        check_metric(name, labels)
    return {name: METRICS[name](logits, labels) for name in metrics}


def predict(
    model: nn.Module,
    task: str | None,
    data: Any,
    *,
    prepare: Prepare | None = None,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Compute a task's logits in eval mode; the model's mode is restored.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: in any form that :func:`fit` takes, or inputs alone.
        prepare: as in :func:`fit`.
        batch_size: samples per forward pass, for data that is not batched already.
        device: None for the model's own device.
        precision: as in :func:`fit`.

    Returns:
        float32 logits ``(N, classes)`` on the CPU, in the data's order.

    Raises:
        VisadaptError: the task or device does not exist; the data is empty; a logit is not finite.

    Example:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> predict(model, "flowers", torch.randn(5, 3, 16, 16)).shape
        torch.Size([5, 3])
    """
    batches = Batches(data, batch_size, "prediction", labelled=False)
    logits_model = LogitsModel(model, prepare or ready, Engine(model, device, precision))
    return logits_and_labels(logits_model, _target(model, task), batches)[0]


def _target(model: nn.Module, task: str | None) -> Target | None:
    return None if task is None else target_of(model, task)


def logits_and_labels(
    logits_model: LogitsModel, target: Target | None, batches: Batches
) -> tuple[Tensor, Tensor | None]:
    """Compute the logits of one epoch in float32; return them and the labels, if any, on the CPU of every process.

    Raises:
        Diverged: a logit is NaN or infinite; metrics of such logits would be plausible but wrong.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    engine = logits_model.engine
    batches.share(engine)
    was_training = logits_model.model.training
    logits_model.eval()
    try:
        with torch.no_grad(), target.context() if target else nullcontext():
            for inputs, batch_labels, rows in batches.epoch():
                out = logits_model(engine.place(inputs))
                logits.append(engine.gather(out)[:rows].cpu())
                if batch_labels is not None:
                    labels.append(engine.gather(engine.place(batch_labels))[:rows].cpu())
    finally:
        logits_model.model.train(was_training)
    all_logits, all_labels = torch.cat(logits), torch.cat(labels) if labels else None
    if all_labels is not None:
        check_labels(all_labels, all_logits.shape[-1], batches.purpose)
    # −inf is allowed: a network may rule out a class, and softmax handles it
    bad = int((~(all_logits < math.inf)).any(-1).sum())
    if bad:
        name = target.name if target else type(logits_model.model).__name__
        raise Diverged(f"{name} gives NaN or infinite logits for {bad} of {len(all_logits)} {batches.purpose} samples")
    return all_logits, all_labels
