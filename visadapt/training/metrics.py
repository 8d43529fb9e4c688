"""Metrics: one number from the outputs and labels of a split; larger is better, except for the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.training.losses import IGNORED, Objective, out_of_range


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples (of the positions, for dense labels) whose largest logit is that of the label."""
    logits, labels = _flat(logits, labels)
    return (logits.argmax(-1) == labels).double().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose label is among the five largest logits (all of them, with fewer classes)."""
    logits, labels = _flat(logits, labels)
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of class 1, for heads of two classes.

    Raises:
        VisadaptError: the head does not have two classes.
    """
    logits, labels = _flat(logits, labels)
    check_metric("f1", classes=logits.shape[-1])
    return _torchmetrics("f1").f1_score(logits.argmax(-1), labels, task="binary").item()  # type: ignore[no-any-return]


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of each class that occurs in labels or predictions, averaged with equal weights."""
    logits, labels = _flat(logits, labels)
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1], "average": "macro"}
    return _torchmetrics("macro_f1").f1_score(logits, labels, **options).item()  # type: ignore[no-any-return]


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 if all predictions or all labels are equal."""
    logits, labels = _flat(logits, labels)
    functional = _torchmetrics("matthews")
    if not (_vary(logits.argmax(-1)) and _vary(labels)):
        # 0/0: for two classes torchmetrics takes a limit, above 0 for a constant prediction of the larger class
        return 0.0
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1]}
    return functional.matthews_corrcoef(logits, labels, **options).item()  # type: ignore[no-any-return]


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class that occurs in labels or predictions, averaged with equal weights."""
    logits, labels = _flat(logits, labels)
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1], "average": "macro"}
    return _torchmetrics("mean_iou").jaccard_index(logits, labels, **options).item()  # type: ignore[no-any-return]


def micro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 over all pairs of a sample and a label, for several labels per sample; a positive logit predicts a label."""
    options: dict[str, Any] = {"task": "binary"}
    return _torchmetrics("micro_f1").f1_score((logits > 0).flatten(), labels.flatten().long(), **options).item()  # type: ignore[no-any-return]


def mean_ap(logits: Tensor, labels: Tensor) -> float:
    """Average precision of each label that occurs, averaged with equal weights, for several labels per sample.

    It is 0 if no label occurs.
    """
    functional = _torchmetrics("mean_ap")
    some = labels.bool().any(0)
    if not some.any():
        return 0.0
    options: dict[str, Any] = {"task": "multilabel", "num_labels": int(some.sum())}
    value = functional.average_precision(logits[:, some], labels[:, some].long(), **options)
    return value.item()  # type: ignore[no-any-return]


def pearson(logits: Tensor, labels: Tensor) -> float:
    """Linear correlation of the single output with real-valued labels; 0 if all outputs or all labels are equal."""
    functional = _torchmetrics("pearson")
    if not (_vary(logits) and _vary(labels)):
        return 0.0
    return functional.pearson_corrcoef(logits[:, 0].double(), labels.double().flatten()).item()  # type: ignore[no-any-return]


def spearman(logits: Tensor, labels: Tensor) -> float:
    """Rank correlation of the single output with real-valued labels; 0 if all outputs or all labels are equal."""
    return _torchmetrics("spearman").spearman_corrcoef(logits[:, 0].double(), labels.double().flatten()).item()  # type: ignore[no-any-return]


def loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross entropy in nats, or mean squared error of real values; smaller is better."""
    return Objective().losses(logits.double(), labels).mean().item()


def _vary(values: Tensor) -> bool:
    return bool((values != values[0]).any())


def _flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Dense outputs ``(N, C, …)`` and labels ``(N, …)`` as one row per position that counts."""
    if labels.ndim == 1:
        return logits, labels
    rows, each = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return rows[each != IGNORED], each[each != IGNORED]


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "top5": top5,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "mean_iou": mean_iou,
    "micro_f1": micro_f1,
    "mean_ap": mean_ap,
    "pearson": pearson,
    "spearman": spearman,
    "loss": loss,
}
"""Metrics by the names that ``fit`` and ``evaluate`` take."""

METRIC_OF = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "pearson",
}
"""The usual metric, by what the labels are."""

_OF_REALS = ("pearson", "spearman")

_OF_SEVERAL = ("micro_f1", "mean_ap")

OF_CLASSES = tuple(name for name in METRICS if name not in (*_OF_REALS, *_OF_SEVERAL))
"""Names of the metrics for class labels."""


def check_metric(name: str, labels: Tensor | None = None, classes: int | None = None) -> None:
    """Refuse a metric that does not exist or does not fit the labels or the number of classes.

    Args:
        name: of the metric.
        labels: to be scored; None if not known yet.
        classes: width of the head; None if not known yet.

    Raises:
        VisadaptError: the message names the metric and what it needs.
    """
    check_choice(name, METRICS, "metric")
    if name == "f1" and classes not in (None, 2):
        raise VisadaptError(f"the head must have 2 classes for f1, got {classes}; macro_f1 takes any number of classes")
    if labels is None or name == "loss":
        return
    needed = "real-valued" if name in _OF_REALS else "several" if name in _OF_SEVERAL else "class"
    if labels.dtype == torch.bool or (labels.ndim == 2 and needed == "several"):
        got = "several"
    else:
        got = "real-valued" if labels.is_floating_point() else "class"
    if needed != got:
        words = {"several": "several per sample", "real-valued": "real-valued", "class": "one class per sample"}
        fitting = {"several": _OF_SEVERAL, "real-valued": _OF_REALS, "class": ("accuracy",)}[got]
        other = f"give a metric such as {fitting[0]!r} or 'loss'"
        raise VisadaptError(f"labels must be {words[needed]} for {name}, got {words[got]}: {other}")
    if needed == "real-valued" and labels.ndim > 1 and labels.shape[1:] != (1,):
        raise VisadaptError(f"labels must be one real value per sample for {name}, got {tuple(labels.shape)}")


def check_range(name: str, outputs: Tensor, labels: Tensor) -> None:
    """Refuse class indices that a metric would count as errors, although no output stands for them.

    Args:
        name: of the metric.
        outputs: ``(N, C)`` or ``(N, C, …)``.
        labels: of the same samples.

    Raises:
        VisadaptError: a label is out of range.
    """
    if name not in OF_CLASSES or name == "loss" or labels.is_floating_point() or outputs.ndim < 2:
        return
    if wrong := out_of_range(labels, outputs.shape[1]):
        raise VisadaptError(
            f"labels must be from 0 to {outputs.shape[1] - 1} for {name}, got {wrong}; or pass a metric of your own"
        )


def _torchmetrics(name: str) -> Any:
    return require("torchmetrics.functional", f"the metric {name}", "visadapt[train]")
