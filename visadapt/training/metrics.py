"""Metrics: one number from the logits and labels of a split; larger is better, except for the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.training.losses import losses


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose largest logit is that of the label."""
    return (logits.argmax(-1) == labels).double().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose label is among the five largest logits (all of them, with fewer classes)."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of class 1, for heads of two classes.

    Raises:
        VisadaptError: the head does not have two classes.
    """
    check_metric("f1", classes=logits.shape[-1])
    return _torchmetrics("f1").f1_score(logits.argmax(-1), labels, task="binary").item()  # type: ignore[no-any-return]


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of each class that occurs in labels or predictions, averaged with equal weights."""
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1], "average": "macro"}
    return _torchmetrics("macro_f1").f1_score(logits, labels, **options).item()  # type: ignore[no-any-return]


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 if all predictions or all labels are equal."""
    functional = _torchmetrics("matthews")
    if not (_vary(logits.argmax(-1)) and _vary(labels)):
        # 0/0: for two classes torchmetrics takes a limit, above 0 for a constant prediction of the larger class
        return 0.0
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1]}
    return functional.matthews_corrcoef(logits, labels, **options).item()  # type: ignore[no-any-return]


def pearson(logits: Tensor, labels: Tensor) -> float:
    """Linear correlation of the single output with real-valued labels; 0 if all outputs or all labels are equal."""
    functional = _torchmetrics("pearson")
    if not (_vary(logits) and _vary(labels)):
        return 0.0
    return functional.pearson_corrcoef(logits[:, 0].double(), labels.double()).item()  # type: ignore[no-any-return]


def spearman(logits: Tensor, labels: Tensor) -> float:
    """Rank correlation of the single output with real-valued labels; 0 if all outputs or all labels are equal."""
    return _torchmetrics("spearman").spearman_corrcoef(logits[:, 0].double(), labels.double()).item()  # type: ignore[no-any-return]


def _vary(values: Tensor) -> bool:
    return bool((values != values[0]).any())


def loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross entropy in nats, or mean squared error of real values; smaller is better."""
    return losses(logits.double(), labels).mean().item()


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "top5": top5,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "loss": loss,
}
"""Metrics by the names that ``fit`` and ``evaluate`` take."""

_OF_REALS = ("pearson", "spearman")

OF_CLASSES = tuple(name for name in METRICS if name not in _OF_REALS)
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
        raise VisadaptError(f"f1 needs a head of 2 classes, got {classes}; macro_f1 takes any number of classes")
    if labels is not None and name != "loss" and labels.is_floating_point() != (name in _OF_REALS):
        needed, got = ("real-valued", "class") if name in _OF_REALS else ("class", "real-valued")
        raise VisadaptError(f"{name} needs {needed} labels, got {got} labels")


def _torchmetrics(name: str) -> Any:
    return require("torchmetrics.functional", f"the metric {name}", "visadapt[train]")
