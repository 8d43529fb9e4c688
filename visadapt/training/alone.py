"""What keeps a training run and the rest of a process apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

from visadapt.backbone.modules import unwrapped
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import find_registry
from visadapt.runtime.twins import task_twin

P = ParamSpec("P")
R = TypeVar("R")

_RUNNING = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse a call while another thread is within one: both would draw from torch's one random generator."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _RUNNING.acquire(blocking=False):
            raise VisadaptError(
                f"another thread of this process is in {function.__name__}(), and both would draw random numbers from "
                "one generator: train one task after another, or in processes of their own"
            )
        try:
            return function(*args, **kwargs)
        finally:
            _RUNNING.release()

    return call


def beside_serving(model: nn.Module, task: str | None, cached: bool) -> nn.Module:
    """The model to train a task in: a copy that shares its tensors, so that the modes of the model do not change.

    Args:
        model: the model.
        task: name of the task; None for a plain model.
        cached: whether its prefix is cached, which is known for the model itself only.

    Returns:
        The copy; the model itself where there can be none.
    """
    # a wrapper, such as a compiled model, is trained as it is
    twin = None if task is None or cached or unwrapped(model) is not model else task_twin(model, task)
    return model if twin is None else twin


@contextmanager
def reserved(model: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Refuse forwards of a model in other threads while it is trained itself, and not a copy of it."""
    registry = find_registry(model) if trained is model else None
    if registry is None:
        yield
        return
    with registry.reservation.hold():
        yield
