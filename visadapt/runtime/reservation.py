"""Reserve a model for one thread, while its modules are in modes that forwards of other threads must not use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from visadapt.errors import VisadaptError


class Reservation:
    """The thread that a model is reserved for, if any."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Refuse a forward in another thread than the one that the model is reserved for.

        Raises:
            VisadaptError: it is kept for another thread.
        """
        if self._thread is not None and self._thread is not threading.current_thread():
            raise VisadaptError(
                "another thread has put this model into modes that all its tasks would see, to train with a cached "
                "prefix or to compute one: wait until it is done, or train without a cached prefix, which leaves the "
                "modes as they are"
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Reserve the model for this thread; forwards in others are refused.

        Raises:
            VisadaptError: it is kept for another thread.
        """
        with self._lock:
            self.check()
            before, self._thread = self._thread, threading.current_thread()
        try:
            yield
        finally:
            self._thread = before
