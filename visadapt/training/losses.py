"""The training loss: one of the named ones, chosen by the kind of label, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError, first_line

Loss = str | Callable[[Any, Any], Tensor]
"""One of ``LOSSES``, or a function of outputs and labels."""

LOSSES = ("cross_entropy", "bce", "mse")
"""Names of the losses that ``fit`` and ``evaluate`` take."""

IGNORED = -100
"""Label of a position that the cross entropy of dense labels leaves out, as in torch."""


class Diverged(VisadaptError):  # noqa: N818  named after the event, not with an Error suffix
    """A loss, gradient or logit is NaN or infinite.

    Examples:
        >>> issubclass(visadapt.training.Diverged, visadapt.VisadaptError)
        True
    """


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Args:
        loss: ``cross_entropy`` of class indices ``(N,)`` or ``(N, …)`` for outputs ``(N, C, …)``, or of probabilities
            of the outputs' shape (soft targets); ``bce``, the binary cross entropy of every output with a label in
            [0, 1] (several labels per sample); ``mse``, the squared error of real values of the outputs' shape; or a
            function of outputs and labels that returns their mean loss, or one loss per sample (further axes are
            averaged). None chooses by the labels where they leave no choice: int64 ``(N,)`` and dense int64
            ``(N, H, W)`` are classes, bool ``(N, C)`` has several labels per sample, floats ``(N,)`` or ``(N, 1)`` are
            real values.
        label_smoothing: of the cross entropy.

    Raises:
        VisadaptError: no loss has this name.
    """

    loss: Loss | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_choice(self.loss, LOSSES, "loss")
        elif self.loss is not None and not callable(self.loss):
            raise VisadaptError(
                f"loss must be one of {', '.join(LOSSES)} or a function of outputs and labels, "
                f"got {type(self.loss).__name__}"
            )
        elif isinstance(self.loss, type):
            raise VisadaptError(f"loss must be a function of outputs and labels, got a class: {self.loss.__name__}()")
        if self.label_smoothing and self.loss not in (None, "cross_entropy"):
            raise VisadaptError(f"label_smoothing={self.label_smoothing:g} applies to the cross entropy only")

    def kind(self, labels: Tensor) -> str | None:
        """The name of the loss for these labels; None for the caller's own function.

        Raises:
            VisadaptError: no loss is given, and these labels do not say which is meant.
        """
        if self.loss is not None:
            return self.loss if isinstance(self.loss, str) else None
        if labels.dtype == torch.int64 and (labels.ndim == 1 or labels.ndim > 2):
            return "cross_entropy"
        if labels.is_floating_point() and (labels.ndim == 1 or labels.shape[1:] == (1,)):
            return "mse"
        if labels.ndim == 2 and labels.dtype == torch.bool:
            return "bce"
        got = f"{labels.dtype} of {tuple(labels.shape)}"
        raise VisadaptError(
            "without loss=, labels must be class indices (int64) or real values, of shape (N,), int64 of (N, H, W) or "
            f"bool of (N, C); got {got}: name the loss, 'cross_entropy' (for soft targets too), 'bce' (several labels "
            "per sample) or 'mse', or pass a function"
        )

    def check_labels(self, labels: Tensor, outputs: int, purpose: str) -> None:
        """Refuse labels that a head with this number of outputs cannot predict.

        Raises:
            VisadaptError: a class index is out of range, the labels are not as wide as the head, or real values meet
                a head of several outputs.
        """
        kind = self.kind(labels)
        if kind == "mse" and labels.ndim == 1 and outputs != 1:
            whole = bool((labels == labels.round()).all())
            hint = " (class indices must be integers)" if whole and self.loss is None else ""
            raise VisadaptError(f"the head must have 1 output for real-valued {purpose} labels, got {outputs}{hint}")
        if kind in ("cross_entropy", "bce") and (labels.is_floating_point() or kind == "bce"):
            if (width_of(labels) if labels.ndim > 1 or kind == "bce" else 0) != outputs:
                raise VisadaptError(
                    f"{purpose} labels must be one column per output of the head, {outputs}, got {tuple(labels.shape)}"
                )
            low, high = float(labels.min()), float(labels.max())
            if not 0 <= low <= high <= 1:
                raise VisadaptError(f"{purpose} labels must be in [0, 1] for {kind}, got {low:g} to {high:g}")
        elif kind == "cross_entropy" and (wrong := out_of_range(labels, outputs)):
            raise VisadaptError(f"{purpose} labels must be from 0 to {outputs - 1}, the head's classes, got {wrong}")

    def check(self, outputs: Tensor, labels: Tensor, purpose: str, name: str) -> None:
        """Refuse outputs that do not fit the labels' shape.

        Args:
            outputs: of the model.
            labels: of the same samples.
            purpose: of the data, for messages.
            name: of the model.

        Raises:
            VisadaptError: the message gives both shapes.
        """
        kind, got = self.kind(labels), tuple(outputs.shape)
        if outputs.ndim < 1 or len(outputs) != len(labels):
            raise VisadaptError(f"{name} must give one output per sample, {len(labels)}, got {got}")
        if kind == "cross_entropy" and not labels.is_floating_point():
            rest = tuple(labels.shape[1:])
            if outputs.ndim < 2 or outputs.shape[2:] != rest:
                wanted = ", ".join(("N", "classes", *map(str, rest)))
                raise VisadaptError(f"logits of {name} must have shape ({wanted}), got {got}")
        elif kind == "mse" and labels.ndim == 1:
            if outputs.shape not in (labels.shape, (len(labels), 1)):
                count = outputs.shape[1] if outputs.ndim == 2 else got
                raise VisadaptError(f"the head must have 1 output for real-valued {purpose} labels, got {count}")
        elif kind is not None and outputs.shape != labels.shape and aligned(outputs, labels).shape != labels.shape:
            raise VisadaptError(
                f"outputs of {name} must have the shape of the {purpose} labels, {tuple(labels.shape)}, got {got}"
            )

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each sample, ``(N,)``.

        Args:
            outputs: ``(N, C)`` or ``(N, C, …)``.
            labels: of the same samples.

        Raises:
            VisadaptError: the caller's function returns neither a number nor one value per sample.
        """
        kind = self.kind(labels)
        if kind is None:
            return self._own(outputs, labels)
        if kind == "mse":
            outputs = aligned(outputs, labels)
            each = F.mse_loss(outputs, labels.to(outputs.dtype), reduction="none")
        elif kind == "bce":
            outputs = aligned(outputs, labels)
            each = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none")
        else:
            soft = labels.to(outputs.dtype) if labels.is_floating_point() else labels
            each = F.cross_entropy(outputs, soft, reduction="none", label_smoothing=self.label_smoothing)
            if labels.ndim > 1 and not labels.is_floating_point():
                counted = (labels != IGNORED).flatten(1).sum(1).clamp(min=1)
                return each.flatten(1).sum(1) / counted
        return each.flatten(1).mean(1) if each.ndim > 1 else each

    def _own(self, outputs: Tensor, labels: Tensor) -> Tensor:
        assert callable(self.loss)
        value = applied("loss", self.loss, outputs, labels)
        if isinstance(value, Tensor) and outputs.requires_grad and not value.requires_grad:
            raise VisadaptError("loss must return a tensor with a gradient: it was detached from the outputs")
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim == 0:
                return value.expand(len(labels))
            if len(value) == len(labels):
                return value.flatten(1).mean(1) if value.ndim > 1 else value
        got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise VisadaptError(f"loss must return one number, or one per sample ({len(labels)}), got {got}")


def out_of_range(labels: Tensor, classes: int) -> str:
    """Describe a class index that is out of range, for messages; empty if none is. In dense labels `IGNORED` may stand.

    Args:
        labels: ``(N,)`` or ``(N, …)``, integers.
        classes: number of classes.
    """
    counted = labels[labels != IGNORED] if labels.ndim > 1 else labels
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low >= 0 and high < classes:
        return ""
    mark = f" ({IGNORED} marks a position that does not count)" if labels.ndim > 1 else ""
    return f"{low if low < 0 else high}{mark}"


def applied(name: str, function: Callable[[Tensor, Tensor], Any], outputs: Tensor, labels: Tensor) -> Any:
    """Call a loss or a metric of the caller's.

    Raises:
        VisadaptError: it raises anything.
    """
    outputs = aligned(outputs, labels)
    try:
        return function(outputs, labels)
    except VisadaptError:
        raise
    except Exception as error:  # whatever a function of the caller's raises
        described = (f"{part} {t.dtype} {tuple(t.shape)}" for part, t in (("outputs", outputs), ("labels", labels)))
        given = " and ".join(described).replace("torch.", "")
        raise VisadaptError(f"{name} cannot take {given}: {first_line(error):.300}") from error


def aligned(outputs: Tensor, labels: Tensor) -> Tensor:
    """A single output per sample, ``(N, 1)``, as ``(N,)`` where the labels are real values ``(N,)``."""
    single = outputs.ndim == 2 and outputs.shape[1] == 1 and labels.ndim == 1 and labels.is_floating_point()
    return outputs[:, 0] if single else outputs


def width_of(outputs: Tensor) -> int:
    """The number of outputs per sample or position: the second axis; 1 where there is none."""
    return outputs.shape[1] if outputs.ndim > 1 else 1
