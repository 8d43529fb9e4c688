"""Options of a task's parts that can be changed after inject."""

from __future__ import annotations

import dataclasses

from visadapt.backbone.modules import ModelT
from visadapt.errors import VisadaptError
from visadapt.methods.dan import DAN, Controller, check_alpha
from visadapt.runtime.registry import registry_of


def set_alpha(model: ModelT, task: str, alpha: float) -> ModelT:
    """Mix the kernels of a task's DAN controllers with the backbone's, as the paper's switch does.

    Args:
        model: an injected model.
        task: name of a task with a ``DAN``.
        alpha: 1 for the task's kernels, 0 for the backbone's, or between.

    Returns:
        The same model. The task's file will remember.

    Raises:
        VisadaptError: the model has no such task, it has no ``DAN``, or ``alpha`` is out of range.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.DAN(), task="flowers", num_classes=3)
        >>> model = visadapt.set_alpha(model, "flowers", 0.5)
        >>> visadapt.summary(model)["flowers"].methods
        'DAN(alpha=0.5)'
    """
    registry = registry_of(model)
    placements = registry.task(task).placements
    if not any(isinstance(placement.method, DAN) for placement in placements):
        raise VisadaptError(f"task {task!r} has no DAN, whose alpha could be set")
    check_alpha(alpha)
    for i, placement in enumerate(placements):
        if isinstance(placement.method, DAN):
            placements[i] = dataclasses.replace(placement, method=dataclasses.replace(placement.method, alpha=alpha))
    for parts in registry.parts(task).values():
        for part in parts.values():
            if isinstance(part, Controller):
                part.alpha = alpha
    return model
