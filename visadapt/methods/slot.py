"""Slots: pass a tensor from one part of a task to another, within one forward."""

from __future__ import annotations

import threading

from torch import Tensor

from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError

_KEPT = threading.local()


class Slot:
    """One tensor per thread, in a thread-local; in a compiled graph, an attribute."""

    kept: Tensor | None = None

    def put(self, x: Tensor) -> None:
        """Keep a tensor."""
        if is_tracing():
            self.kept = x
        else:
            _KEPT.__dict__[str(id(self))] = x

    def take(self, who: str, where: str) -> Tensor:
        """Return the tensor and forget it.

        Args:
            who: the part that takes it, for messages.
            where: the forward that it has to be called in, for messages.

        Raises:
            VisadaptError: nothing was put.
        """
        if is_tracing():
            x, self.kept = self.kept, None
        else:
            x = _KEPT.__dict__.pop(str(id(self)), None)
        if x is None:
            raise VisadaptError(f"{who} was called outside of {where}")
        return x
