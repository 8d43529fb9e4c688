"""The queue of samples that wait for a batch: bounded, first come first served."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from visadapt.serving.catalogue import Entry
from visadapt.serving.refusal import ServingError
from visadapt.serving.samples import Sample


@dataclass(eq=False)
class Item:
    """One sample that waits for its answer.

    Attributes:
        task: name of the task, or ``"auto"`` for the decider's choice.
        sample: the decoded input.
        entry: the version of the task that `prepared` is for; None before the decider chose.
        prepared: a batch of one, as the backbone takes it.
        since: time of arrival, by `time.monotonic`.
        future: receives ``(entry, logits)``, or an error.
    """

    task: str
    sample: Sample
    entry: Entry | None = None
    prepared: Any = None
    since: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it is answered already."""
        with suppress(InvalidStateError):  # answered or cancelled
            self.future.set_exception(error)


class WaitingQueue:
    """Items in order of arrival, taken in batches by a worker.

    A worker that has been idle takes what there is at once: waiting would only delay it. Just after a batch, the
    clients that it answered may ask again: then the oldest item waits until as many items have come as that batch had.

    Args:
        most: items that may wait at the same time.
        max_batch: items per batch.
        max_wait: seconds that the oldest item waits for others, at most.
    """

    def __init__(self, most: int, max_batch: int, max_wait: float) -> None:
        self._most, self._max_batch, self._max_wait = most, max_batch, max_wait
        self._items: deque[Item] = deque()
        self._reserved = 0
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 0.01
        # as if a full batch had just been answered
        self._size, self._ended = max_batch, math.inf

    def __len__(self) -> int:
        return len(self._items)

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Keep room for the items of a request while they are prepared.

        So the inputs of a request are decoded only if the queue takes it.

        Raises:
            ServingError: the queue is full (``overloaded``), or takes no more items (``stopping``).
        """
        with self._changed:
            self._check(count)
            self._reserved += count
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= count

    def put(self, items: Sequence[Item], kept: int = 0) -> None:
        """Append all items of a request, or none of them.

        Args:
            items: of the request.
            kept: the number of them for which the caller keeps `room`.

        Raises:
            ServingError: the queue is full (``overloaded``), or takes no more items (``stopping``).
        """
        with self._changed:
            self._check(len(items) - kept)
            self._items.extend(items)
            self._changed.notify_all()

    def _check(self, more: int) -> None:
        if self._closed:
            raise ServingError("stopping", "the server is stopping", "ask another server", retry_after=5)
        waiting = len(self._items) + self._reserved
        if waiting + more > self._most:
            message = f"{waiting} samples are waiting, and at most {self._most} may"
            raise ServingError("overloaded", message, "send the request again later",
                               retry_after=max(1.0, waiting * self._pace))  # fmt: skip

    def take(self) -> list[Item]:
        """Wait for a batch; empty once the queue is closed and no item is left."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if self._items:
                until = self._items[0].since + self._max_wait
                expected = self._size if time.monotonic() < self._ended + self._max_wait else 1
                while len(self._items) < expected and not self._closed:
                    left = until - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
            return [self._items.popleft() for _ in range(min(len(self._items), self._max_batch))]

    def note(self, items: int, seconds: float) -> None:
        """Note the size of a batch that was answered just now, and how long it took.

        The pace is a moving average, for the estimate of ``Retry-After``.
        """
        self._size, self._ended = items, time.monotonic()
        self._pace += 0.1 * (seconds / max(1, items) - self._pace)

    def close(self) -> None:
        """Refuse further items; those that wait are still taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Item]:
        """Remove all items that wait, and return them."""
        with self._changed:
            left = list(self._items)
            self._items.clear()
            return left
