"""Slots: a tensor on its way from one part of a task to another, within one forward."""

from __future__ import annotations

import threading

from torch import Tensor

from visadapt.backbone.tracing import is_tracing
from visadapt.errors import VisadaptError

_KEPT = threading.local()


class Slot:
    """One tensor on its way, each thread's its own; a compiled graph takes an attribute."""

    kept: Tensor | None = None

    def put(self, x: Tensor) -> None:
        """Keep a tensor."""
        if is_tracing():
            self.kept = x
        else:
            _KEPT.__dict__[str(id(self))] = x

    def take(self, who: str, where: str) -> Tensor:
        """Give it back and keep it no longer.

        Args:
            who: takes it, for the error.
            where: it has to be called, for the error.

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
