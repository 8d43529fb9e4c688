"""Metrics: one number from all logits and labels of a split; larger is better, but for a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.optional import require
from visadapt.training.losses import losses


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose label is among the five largest logits (all of them, with fewer classes)."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of class 1, for heads of two classes.

    Raises:
        VisadaptError: the head has another number of classes.
    """
    check_metric("f1", classes=logits.shape[-1])
    return _torchmetrics("f1").f1_score(logits.argmax(-1), labels, task="binary").item()  # type: ignore[no-any-return]


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of each class that occurs in labels or predictions, averaged with equal weights."""
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1], "average": "macro"}
    return _torchmetrics("macro_f1").f1_score(logits, labels, **options).item()  # type: ignore[no-any-return]


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where all answers or all labels are alike."""
    theirs = _torchmetrics("matthews")
    if not (_vary(logits.argmax(-1)) and _vary(labels)):
        # 0/0, which torchmetrics takes to a limit, of two classes, that is more than 0 for whoever says the larger one
        return 0.0
    options: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1]}
    return theirs.matthews_corrcoef(logits, labels, **options).item()  # type: ignore[no-any-return]


def pearson(logits: Tensor, labels: Tensor) -> float:
    """Linear correlation of the one output with real-valued labels; 0 where all outputs or all labels are alike."""
    theirs = _torchmetrics("pearson")
    if not (_vary(logits) and _vary(labels)):
        return 0.0
    return theirs.pearson_corrcoef(logits[:, 0].double(), labels.double()).item()  # type: ignore[no-any-return]


def spearman(logits: Tensor, labels: Tensor) -> float:
    """Correlation of the ranks of the one output and of real-valued labels; 0 where either are all alike."""
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
"""By name, as ``fit`` and ``evaluate`` take them."""

_OF_REALS = ("pearson", "spearman")

OF_CLASSES = tuple(name for name in METRICS if name not in _OF_REALS)
"""The names of those that labels which are classes can be scored by."""


def check_metric(name: str, labels: Tensor | None = None, classes: int | None = None) -> None:
    """Refuses a metric that there is not, or that is not of such labels or of so many classes."""
    check_choice(name, METRICS, "metric")
    if name == "f1" and classes not in (None, 2):
        raise VisadaptError(f"f1 is of two classes, the head has {classes}: macro_f1 is of any number")
    if labels is not None and name != "loss" and labels.is_floating_point() != (name in _OF_REALS):
        kinds = ("real values", "classes") if name in _OF_REALS else ("classes", "real values")
        raise VisadaptError(f"{name} is a metric of {kinds[0]}, and the labels are {kinds[1]}")


def _torchmetrics(name: str) -> Any:
    return require("torchmetrics.functional", f"the metric {name}", "visadapt[train]")
