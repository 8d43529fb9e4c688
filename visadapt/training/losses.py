"""The training loss: cross entropy of classes, or squared error of real values."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from visadapt.errors import VisadaptError


class Diverged(VisadaptError):  # noqa: N818  named after the event, not with an Error suffix
    """A loss, gradient or logit is NaN or infinite."""


def losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss of each sample, ``(N,)``.

    Args:
        logits: ``(N, C)``.
        labels: class indices, int64, ``(N,)``, for the cross entropy in nats; or real values, ``(N,)``, for the squared
            error of one output (C = 1).
        label_smoothing: for the cross entropy only.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def check_labels(labels: Tensor, outputs: int, purpose: str) -> None:
    """Refuse labels that a head with this number of outputs cannot predict.

    Raises:
        VisadaptError: a class index is out of range, or real values meet a head of several outputs.
    """
    if labels.is_floating_point():
        if outputs != 1:
            raise VisadaptError(f"the head must have 1 output for real-valued {purpose} labels, got {outputs}")
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        wrong = low if low < 0 else high
        raise VisadaptError(f"{purpose} labels must be from 0 to {outputs - 1}, the head's classes, got {wrong}")
