"""The logits of a mixed batch, taken apart again: each task's rows, as wide as its own head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.printable import shown
from visadapt.runtime.registry import facts_of, registry_of


@takes("axis")
def split(
    model: nn.Module, logits: Tensor, tasks: Sequence[str | None], *, axis: int | None = None
) -> dict[str | None, Tensor]:
    """Split the logits of a mixed batch by task, each cut to the width of its own head.

    Args:
        model: the injected model.
        logits: ``(N, K)``, ``(N, K, H, W)`` or ``(N, T, K)``, where K is the width of the widest head; narrower ones
            are padded with −inf.
        tasks: the task of each sample, as given to `visadapt.using`.
        axis: the axis of the classes. If None, it is the one that is K long; of several, the one along which the
            narrower tasks' rows are −inf beyond their width.

    Returns:
        Task → the rows of its samples, in the batch's order, k classes wide.

    Raises:
        VisadaptError: a task is unknown, there are not as many tasks as rows, or the axis of the classes is not
            established.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=5).eval()
        >>> names = ["birds", "flowers", "birds"]
        >>> with torch.no_grad(), visadapt.using(model, names):
        ...     logits = model(torch.randn(3, 3, 32, 32))
        >>> logits.shape, visadapt.split(model, logits, names)["flowers"].shape
        (torch.Size([3, 5]), torch.Size([1, 3]))
    """
    registry = registry_of(model)
    if not logits.ndim:
        raise VisadaptError("logits must have one row per sample, got a single number")
    if len(tasks) != logits.shape[0]:
        raise VisadaptError(f"{len(tasks)} tasks for {logits.shape[0]} rows of logits")
    facts = facts_of(model)
    own = None if facts.head is None else facts.head.classes(facts.modules)
    widths = {name: None if name is None else registry.task(name).num_classes for name in dict.fromkeys(tasks)}
    # a task without a head of its own uses the backbone's
    widths = {name: own if width is None else width for name, width in widths.items()}
    rows = {name: logits[[i for i, task in enumerate(tasks) if task == name]] for name in widths}
    known = {name: width for name, width in widths.items() if width is not None}
    given = None if axis is None else _checked(axis, logits, known)
    if len(set(widths.values())) < 2:
        # one width: nothing was padded
        return rows
    at = _class_axis(logits, rows, known) if given is None else given
    return {name: each if widths[name] is None else each.narrow(at, 0, known[name]) for name, each in rows.items()}


def _checked(axis: int, logits: Tensor, widths: dict[str | None, int]) -> int:
    """A caller's axis, counted from the front."""
    if not isinstance(axis, int) or isinstance(axis, bool) or not -logits.ndim < axis < logits.ndim or axis == 0:
        raise VisadaptError(f"axis must be one of 1 to {logits.ndim - 1}, got {shown(axis)}")
    if logits.shape[axis] < max(widths.values(), default=0):
        raise VisadaptError(f"axis {axis} of {tuple(logits.shape)} is not {max(widths.values())} classes wide")
    return axis % logits.ndim


def _class_axis(logits: Tensor, rows: dict[str | None, Tensor], widths: dict[str | None, int]) -> int:
    """The axis of the classes.

    Raises:
        VisadaptError: no axis is as long as the widest head, or several are and none is padded.
    """
    widest = max(widths.values())
    fitting = [at for at in range(1, logits.ndim) if logits.shape[at] == widest]
    if not fitting:
        raise VisadaptError(f"no axis of logits of shape {tuple(logits.shape)} is {widest} wide, as the widest head")
    if len(fitting) == 1:
        return fitting[0]
    narrow = {name: width for name, width in widths.items() if width < widest}
    padded = [at for at in fitting if all(_is_padded(rows[name], at, width) for name, width in narrow.items())]
    if len(padded) != 1:
        raise VisadaptError(
            f"it is not known which axis of logits of shape {tuple(logits.shape)} is that of the {widest} classes: say "
            "so by axis="
        )
    return padded[0]


def _is_padded(rows: Tensor, axis: int, width: int) -> bool:
    beyond = rows.narrow(axis, width, rows.shape[axis] - width)
    return bool(torch.isneginf(beyond).all())
