"""Logits and metrics of a task on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.arguments import takes
from visadapt.checks import check_count
from visadapt.data.samples import ready
from visadapt.runtime.modes import keep_modes
from visadapt.training.batches import Batches
from visadapt.training.engine import Engine, LogitsModel
from visadapt.training.losses import Diverged, Loss, Objective, width_of
from visadapt.training.scoring import Metric, Scores, check_score
from visadapt.training.target import Target, target_of

Prepare = Callable[[Any], Any]


@takes()
def evaluate(
    model: nn.Module,
    task: str | None,
    data: Any,
    metrics: Sequence[Metric] = ("accuracy", "loss"),
    *,
    loss: Loss | None = None,
    prepare: Prepare | None = None,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> dict[str, float]:
    """Compute metrics of a task in eval mode; the model's mode is restored.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: inputs and labels, in any form that `fit` takes.
        metrics: names in ``METRICS``, objects of torchmetrics (updated batch by batch), or functions of all outputs and
            labels of the split that return one number.
        loss: as in `fit`; what ``labels`` mean, and the metric ``loss``.
        prepare: as in `fit`.
        batch_size: samples per forward pass, for data that is not batched already.
        device: None for the model's own device.
        precision: as in `fit`.

    Returns:
        The metrics by name; functions and classes by their own.

    Raises:
        VisadaptError: the task, metric or device does not exist; the data is empty or has no labels; a logit is not
            finite.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> sorted(evaluate(model, "flowers", (images, labels)))
        ['accuracy', 'loss']
    """
    objective = Objective(loss)
    check_count(batch_size, "batch_size")
    batches = Batches(data, batch_size, "evaluation", objective=objective)
    target = _target(model, task)
    for metric in metrics:
        check_score(metric, batches.labels, None if target is None else target.classes)
    logits_model = LogitsModel(model, prepare or ready, Engine(model, device, precision))
    return scores(logits_model, target, batches, metrics)


@takes()
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
        data: in any form that `fit` takes, or inputs alone.
        prepare: as in `fit`.
        batch_size: samples per forward pass, for data that is not batched already.
        device: None for the model's own device.
        precision: as in `fit`.

    Returns:
        float32 logits ``(N, classes)`` on the CPU, in the data's order; of dense tasks ``(N, classes, …)``.

    Raises:
        VisadaptError: the task or device does not exist; the data is empty; a logit is not finite.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> predict(model, "flowers", torch.randn(5, 3, 16, 16)).shape
        torch.Size([5, 3])
    """
    check_count(batch_size, "batch_size")
    batches = Batches(data, batch_size, "prediction", labelled=False)
    logits_model = LogitsModel(model, prepare or ready, Engine(model, device, precision))
    target = _target(model, task)
    parts: list[Tensor] = []
    run_epoch(logits_model, target, batches, lambda outputs, _: parts.append(outputs))
    return torch.cat(parts)


def _target(model: nn.Module, task: str | None) -> Target | None:
    return None if task is None else target_of(model, task)


def scores(
    logits_model: LogitsModel, target: Target | None, batches: Batches, metrics: Sequence[Metric]
) -> dict[str, float]:
    """Compute metrics of one epoch, by name.

    Raises:
        VisadaptError: labels or outputs do not fit the loss or a metric.
        Diverged: an output is NaN or infinite; metrics of such outputs would be plausible but wrong.
    """
    totals, objective, name = Scores(metrics, batches.objective), batches.objective, type(logits_model.model).__name__

    def add(outputs: Tensor, labels: Tensor | None) -> None:
        assert labels is not None
        objective.check(outputs, labels, batches.purpose, name)
        objective.check_labels(labels, width_of(outputs), batches.purpose)
        totals.update(outputs, labels)

    run_epoch(logits_model, target, batches, add)
    return totals.compute()


def run_epoch(
    logits_model: LogitsModel, target: Target | None, batches: Batches, use: Callable[[Tensor, Tensor | None], None]
) -> None:
    """Compute the outputs of one epoch in eval mode.

    Args:
        logits_model: the model.
        target: the task; None for a plain model.
        batches: the data.
        use: called with the float32 outputs of each batch, and its labels, if any, on the CPU of every process.

    Raises:
        Diverged: an output is NaN or infinite; ``use`` is not called from the first such batch on.
    """
    engine, bad, count = logits_model.engine, 0, 0
    batches.share(engine)
    with target.context() if target else nullcontext(), keep_modes(logits_model.model), torch.no_grad():
        logits_model.eval()
        for inputs, batch_labels, rows in batches.epoch():
            outputs = engine.gather(logits_model(logits_model.place(inputs)))[:rows].cpu()
            labels = None if batch_labels is None else engine.gather(engine.place(batch_labels))[:rows].cpu()
            # −inf is allowed: a network may rule out a class, and softmax handles it
            bad += int((~(outputs < math.inf)).reshape(len(outputs), -1).any(-1).sum())
            count += len(outputs)
            if not bad:
                use(outputs, labels)
    if bad:
        name = target.name if target else type(logits_model.model).__name__
        raise Diverged(f"{name} gives NaN or infinite logits for {bad} of {count} {batches.purpose} samples")
