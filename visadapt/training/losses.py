"""What training makes small: the cross entropy of classes, or the squared error of real values."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from visadapt.errors import VisadaptError


class Diverged(VisadaptError):  # noqa: N818  it is caught as what happened
    """A loss, a gradient or a logit became infinite or no number."""


def losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each sample, ``(N,)``.

    Args:
        logits: ``(N, C)``.
        labels: class indices, int64, ``(N,)``, for the cross entropy in nats; or real values, ``(N,)``, for the squared
            error of one output (C = 1).
        label_smoothing: of the cross entropy.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def check_labels(labels: Tensor, outputs: int, what: str) -> None:
    """Refuses labels that a head of so many outputs cannot give."""
    if labels.is_floating_point():
        if outputs != 1:
            raise VisadaptError(f"the {what} data has real values for labels; the head has {outputs} outputs, not one")
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise VisadaptError(f"the {what} data has label {low if low < 0 else high}; the head has {outputs} classes")
