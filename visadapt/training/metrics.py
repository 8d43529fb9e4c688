"""Metrics: one number from all logits and labels of a split; larger is better, but for a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the samples whose label is among the five largest logits (all of them, with fewer classes)."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(-1).double().mean().item()


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 of each class that occurs in labels or predictions, averaged with equal weights."""
    table = confusion(logits, labels)
    hits, predicted, true = table.diagonal(), table.sum(0), table.sum(1)
    occurs = predicted + true > 0
    return (2 * hits[occurs] / (predicted + true)[occurs]).mean().item()


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where predictions or labels are all alike."""
    table = confusion(logits, labels)
    hits, total, predicted, true = table.trace(), table.sum(), table.sum(0), table.sum(1)
    covariance = hits * total - predicted @ true
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross entropy, in nats; smaller is better."""
    return F.cross_entropy(logits.double(), labels).item()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """How often (true class, predicted class) occurs: float64, ``(C, C)``."""
    classes = logits.shape[-1]
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "top5": top5,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "loss": loss,
}
"""By name, as ``fit`` and ``evaluate`` take them."""
