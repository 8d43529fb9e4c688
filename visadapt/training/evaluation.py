"""A task's logits and figures on data that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.data.samples import ready
from visadapt.training.batches import Batches
from visadapt.training.engine import Engine, Performer
from visadapt.training.losses import Diverged, check_labels
from visadapt.training.metrics import METRICS, check_metric
from visadapt.training.target import Trainee, trainee

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
    """Metrics of a task, in eval mode; the model is left in the mode it was in.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: inputs and labels, in any form that :func:`fit` takes.
        metrics: names; see ``METRICS``.
        prepare: as in :func:`fit`.
        batch_size: samples a forward, where the data does not batch itself.
        device: None for where the model is.
        precision: as in :func:`fit`.

    Returns:
        The metrics by name.

    Raises:
        VisadaptError: no such task, metric or device; the data has no labels or is empty; logits that are no numbers.
    """
    source = Batches(data, batch_size, "evaluation")
    chosen = _chosen(model, task)
    for name in metrics:
        check_metric(name, source.labels, None if chosen is None else chosen.classes)
    performer = Performer(model, prepare or ready, Engine(model, device, precision))
    logits, labels = outputs(performer, chosen, source)
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
    """Logits of a task for inputs, with or without labels.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: in any form that :func:`fit` takes, or inputs alone.
        prepare: as in :func:`fit`.
        batch_size: samples a forward, where the data does not batch itself.
        device: None for where the model is.
        precision: as in :func:`fit`.

    Returns:
        float32 logits ``(N, classes)`` on the CPU, in the data's order.

    Raises:
        VisadaptError: no such task or device, or no data; logits that are no numbers.
    """
    source = Batches(data, batch_size, "prediction", labelled=False)
    performer = Performer(model, prepare or ready, Engine(model, device, precision))
    return outputs(performer, _chosen(model, task), source)[0]


def _chosen(model: nn.Module, task: str | None) -> Trainee | None:
    return None if task is None else trainee(model, task)


def outputs(performer: Performer, chosen: Trainee | None, source: Batches) -> tuple[Tensor, Tensor | None]:
    """All logits of an epoch in float32, and all labels if there are any, on the CPU of every process.

    Raises:
        Diverged: a logit is NaN or infinite: whatever is made of it would look like a figure and be none.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    engine = performer.engine
    source.share(engine)
    was = performer.model.training
    performer.eval()
    try:
        with torch.no_grad(), chosen.chosen() if chosen else nullcontext():
            for inputs, target, rows in source.epoch():
                out = performer(engine.place(inputs))
                logits.append(engine.gather(out)[:rows].cpu())
                if target is not None:
                    labels.append(engine.gather(engine.place(target))[:rows].cpu())
    finally:
        performer.model.train(was)
    found, every = torch.cat(logits), torch.cat(labels) if labels else None
    if every is not None:
        check_labels(every, found.shape[-1], source.what)
    # −inf is a class that a network rules out, and a softmax can bear it
    bad = int((~(found < math.inf)).any(-1).sum())
    if bad:
        name = chosen.name if chosen else type(performer.model).__name__
        raise Diverged(f"{name} gives NaN or infinite logits for {bad} of {len(found)} {source.what} samples")
    return found, every
