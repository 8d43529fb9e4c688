"""A task's logits and figures on data that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.errors import VisadaptError
from visadapt.methods.method import check_choice
from visadapt.training.engine import Engine, call
from visadapt.training.metrics import METRICS
from visadapt.training.samples import Batches, ready
from visadapt.training.trainee import Trainee, trainee

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
    precision: str = "fp32",
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
        precision: ``fp32`` or ``bf16``.

    Returns:
        The metrics by name.

    Raises:
        VisadaptError: no such task, metric or device; the data has no labels or is empty.
    """
    for name in metrics:
        check_choice(name, METRICS, "metric")
    source = Batches(data, batch_size, "evaluation")
    engine = Engine(model, device, precision)
    logits, labels = outputs(model, _chosen(model, task), source, engine, prepare or ready)
    assert labels is not None
    return {name: METRICS[name](logits, labels) for name in metrics}


def predict(
    model: nn.Module,
    task: str | None,
    data: Any,
    *,
    prepare: Prepare | None = None,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Logits of a task for inputs, with or without labels.

    Args:
        model: an injected model, or a plain one.
        task: its name; None for a plain model.
        data: in any form that :func:`fit` takes, or inputs alone.
        prepare: as in :func:`fit`.
        batch_size: samples a forward, where the data does not batch itself.
        device: None for where the model is.
        precision: ``fp32`` or ``bf16``.

    Returns:
        float32 logits ``(N, classes)`` on the CPU, in the data's order.

    Raises:
        VisadaptError: no such task or device, or no data.
    """
    source = Batches(data, batch_size, "prediction", labelled=False)
    return outputs(model, _chosen(model, task), source, Engine(model, device, precision), prepare or ready)[0]


def _chosen(model: nn.Module, task: str | None) -> Trainee | None:
    return None if task is None else trainee(model, task)


def outputs(
    model: nn.Module, chosen: Trainee | None, source: Batches, engine: Engine, prepare: Prepare
) -> tuple[Tensor, Tensor | None]:
    """All logits of an epoch in float32, and all labels if there are any, on the CPU."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), chosen.chosen() if chosen else nullcontext():
            for inputs, target in source.epoch():
                with engine.autocast():
                    out = call(model, prepare(engine.place(inputs)))
                logits.append(out.float().cpu())
                if target is not None:
                    labels.append(target.cpu())
    finally:
        model.train(was)
    every = torch.cat(labels) if labels else None
    if every is not None:
        check_labels(every, logits[0].shape[-1], source.what)
    return torch.cat(logits), every


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """Refuses labels that a head of ``classes`` outputs cannot give."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise VisadaptError(f"the {what} data has label {low if low < 0 else high}; the head has {classes} classes")
