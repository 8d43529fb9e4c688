"""The worker: one thread that runs all forwards, and is replaced if it crashes."""

from __future__ import annotations

import logging
import threading
import time

from visadapt.serving.forward import Forward
from visadapt.serving.metrics import Metrics
from visadapt.serving.refusal import ServingError
from visadapt.serving.waiting import Item, WaitingQueue

log = logging.getLogger(__name__)


class Worker:
    """Takes batches from a queue and answers them, in one thread.

    The thread is the only one that touches the model: it runs the forwards, and loads and removes tasks between them.

    Args:
        queue: where batches come from.
        forward: answers them.
        metrics: counts replaced threads.
    """

    def __init__(self, queue: WaitingQueue, forward: Forward, metrics: Metrics) -> None:
        self._queue, self._forward, self._metrics = queue, forward, metrics
        self._batch: list[Item] = []
        self._thread = threading.Thread(target=self._run, name="visadapt-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, seconds: float | None) -> bool:
        """Wait until the queue is closed and empty; return whether it is within that time."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            thread = self._thread
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
            if thread is self._thread:
                return not thread.is_alive()

    def _run(self) -> None:
        try:
            while batch := self._queue.take():
                self._batch = batch
                self._metrics.waiting.set(len(self._queue))
                start = time.monotonic()
                self._forward.answer(batch)
                self._queue.note(len(batch), time.monotonic() - start)
                self._batch = []
        except BaseException as error:  # also SystemExit: nothing may leave requests without an answer
            log.exception("the worker crashed and is replaced")
            for item in self._batch:
                item.fail(ServingError("failed", f"the worker crashed: {type(error).__name__}: {error}", "try again"))
            self._metrics.restarts.inc()
            self._batch = []
            self._thread = threading.Thread(target=self._again, name="visadapt-worker", daemon=True)
            self._thread.start()

    def _again(self) -> None:
        self._forward.pool.recover()
        self._run()
