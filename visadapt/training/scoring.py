"""Scores of a split: named metrics, torchmetrics' and the caller's own functions, fed batch by batch."""

from __future__ import annotations

import copy
import functools
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visadapt.errors import VisadaptError
from visadapt.training.losses import Objective, applied
from visadapt.training.metrics import METRICS, check_metric, check_range

_LOSS = "loss"

Metric = str | Callable[[Any, Any], Any]
"""A name in ``METRICS``, a ``torchmetrics.Metric``, or a function of all outputs and labels of a split."""


def metric_name(metric: Metric) -> str:
    """The name of a metric, for tables, logs and results."""
    if isinstance(metric, str):
        return metric
    inner = metric.func if isinstance(metric, functools.partial) else metric
    name: str = getattr(inner, "__name__", type(inner).__name__)
    return "metric" if name == "<lambda>" else name


def larger_is_better(metric: Metric) -> bool:
    """Whether a larger score is better: all named metrics but the loss; others as ``higher_is_better`` says."""
    if isinstance(metric, str):
        return metric != "loss"
    return bool(getattr(metric, "higher_is_better", True))


def check_score(metric: Any, labels: Tensor | None = None, classes: int | None = None) -> None:
    """Refuse a metric that does not exist, does not fit, or does not say which scores are better.

    Args:
        metric: of any kind.
        labels: to be scored; None if not known yet.
        classes: width of the head; None if not known yet.

    Raises:
        VisadaptError: the message names the metric and what it needs.
    """
    if isinstance(metric, str):
        check_metric(metric, labels, classes)
    elif not callable(metric):
        raise VisadaptError(
            "metric must be a name, a torchmetrics.Metric or a function of outputs and labels, "
            f"got {type(metric).__name__}"
        )
    elif isinstance(metric, type):
        raise VisadaptError(
            f"metric must be an object or a function of outputs and labels, got a class: {metric.__name__}()"
        )
    elif _keeps_state(metric) and metric.higher_is_better is None:
        raise VisadaptError(
            f"{metric_name(metric)} does not say whether higher scores are better: set its higher_is_better, or pass "
            "a function of outputs and labels"
        )


class Scores:
    """Metrics of one split, and the mean loss.

    ``loss`` and the metrics of torchmetrics are updated batch by batch. Other metrics see the whole split, whose
    outputs are kept in memory for them.

    Args:
        metrics: of any kind.
        objective: of the metric ``loss``.
    """

    def __init__(self, metrics: Sequence[Metric], objective: Objective) -> None:
        self.objective = objective
        self._metrics: dict[str, Any] = {}
        for metric in metrics:
            name = metric_name(metric)
            if not isinstance(metric, str) and (name in self._metrics or name == _LOSS):
                raise VisadaptError(f"metrics must have names of their own, got another {name}")
            self._metrics[name] = _fresh(metric)
        # by name: torchmetrics' == makes a new metric
        self._whole = [name for name, m in self._metrics.items() if name != _LOSS and not _keeps_state(m)]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._loss, self._count = torch.zeros((), dtype=torch.float64), 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch, on the CPU."""
        for name, metric in self._metrics.items():
            if name == _LOSS:
                exact = outputs.double() if self.objective.kind(labels) is not None else outputs
                self._loss += self.objective.losses(exact, labels).double().sum()
            elif isinstance(metric, str):
                check_metric(name, labels)
                check_range(name, outputs, labels)
            elif _keeps_state(metric):
                applied(f"the metric {name}", metric.update, outputs, labels)
        self._count += len(labels)
        if self._whole:
            self._kept.append((outputs, labels))

    def compute(self) -> dict[str, float]:
        """The scores by name.

        Raises:
            VisadaptError: a metric gives something other than one number.
        """
        outputs, labels = (torch.cat(parts) for parts in zip(*self._kept, strict=True)) if self._kept else (None, None)
        scores = {}
        for name, metric in self._metrics.items():
            if name == _LOSS:
                scores[name] = (self._loss / self._count).item()
            elif isinstance(metric, str):
                assert outputs is not None
                assert labels is not None
                scores[name] = METRICS[metric](outputs, labels)
            elif _keeps_state(metric):
                scores[name] = _number(metric.compute(), name)
            else:
                assert outputs is not None
                assert labels is not None
                scores[name] = _number(applied(f"the metric {name}", metric, outputs, labels), name)
        return scores


def _keeps_state(metric: Any) -> bool:
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(metric, library.Metric)


def _fresh(metric: Any) -> Any:
    if not _keeps_state(metric):
        return metric
    # the caller's own keeps what it has counted; all processes count whole batches, so there is nothing to exchange
    own = copy.deepcopy(metric).cpu()
    own.sync_on_compute = False
    own.reset()
    return own


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    got = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise VisadaptError(f"the metric {name} must give one number, got {got}: pass a function that picks one")
