"""Float32 without TF32, for comparing two computations.

By default, convolutions on a GPU round their inputs to TF32, with 10 bits of mantissa. Batches of different sizes, or a
model and its merged copy, then differ by more than the comparison has to detect.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

_LOCK = threading.Lock()
_INSIDE = 0
_RESTORE: list[Callable[[], None]] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 on GPUs without TF32, in all threads, until the last of these blocks ends.

    The setting is the process's: threads that compute meanwhile are more exact, and slower.

    Examples:
        >>> with full_precision():
        ...     y = torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))
    """
    global _INSIDE
    if not torch.cuda.is_available():
        yield
        return
    with _LOCK:
        if _INSIDE == 0:
            _RESTORE[:] = _changed()
        _INSIDE += 1
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE -= 1
            if _INSIDE == 0:
                for restore in _RESTORE:
                    restore()


def _changed() -> list[Callable[[], None]]:
    """Change the settings; return what restores them, in this order."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    older: list[Callable[[], None]] = []
    with suppress(RuntimeError):  # torch cannot tell where the newer settings were given one by one
        older.append(partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32))
    with suppress(RuntimeError):
        older.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    # torch before 2.9 has the older ones only
    newer: list[Any] = [
        place for place in (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul) if _has_precision(place)
    ]
    restore = older
    for place in newer:
        restore.append(partial(setattr, place, "fp32_precision", place.fp32_precision))
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for place in newer:
        place.fp32_precision = "ieee"
    return restore


def _has_precision(place: Any) -> bool:
    try:
        return isinstance(place.fp32_precision, str)
    except (AttributeError, RuntimeError):
        return False
