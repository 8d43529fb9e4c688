"""A command that is asked to end (SIGTERM) cleans up as one that is interrupted does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""Exit code, as a shell gives it for a process that the signal ended."""


class Terminated(BaseException):
    """Raised where the command is when the signal comes; like KeyboardInterrupt, no handler of errors takes it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the block, in a main thread that does not handle the signal already."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    own = os.getpid()

    def terminate(number: int, _: Any) -> None:
        if os.getpid() != own:
            # a worker that reads images, forked with this handler: the process that started it ends it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
