"""What was meant when the nodes of autograd's graphs were made: a log per thread, by the nodes' sequence numbers."""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from types import FrameType
from typing import Any

import torch


class Log:
    """What was meant in one thread, by the sequence numbers of the autograd nodes made since.

    Attributes:
        starts: ascending numbers.
        tasks: what was meant from each on.
        seen: the number when the thread last chose a task or ended a forward of the model.
        bounded: whether all nodes of the model's have numbers below ``seen``, but for a forward that is under way.
        thread: whose log it is.
    """

    LONGEST = 4096

    def __init__(self, tasks: Any) -> None:
        self.starts = [0]
        self.tasks = [tasks]
        self.seen = 0
        self.bounded = True
        self.thread = weakref.ref(threading.current_thread())

    def add(self, tasks: Any) -> None:
        """Note that ``tasks`` are meant from ``seen`` on."""
        last = self.tasks[-1]
        if last is tasks or (type(last) is type(tasks) and last == tasks and vars_of(last) == vars_of(tasks)):
            return
        if self.starts[-1] >= self.seen:
            self.tasks[-1] = tasks
            return
        self.starts.append(self.seen)
        self.tasks.append(tasks)
        if len(self.starts) > self.LONGEST:
            del self.starts[: self.LONGEST // 2], self.tasks[: self.LONGEST // 2]

    def at(self, number: int) -> tuple[Any, ...] | None:
        """What was meant when the node of that number was made: empty if forgotten, None if none was made here."""
        own = self.thread() is threading.current_thread()
        if self.bounded and number >= (now() if own else self.seen):
            return None
        place = bisect.bisect_right(self.starts, number) - 1
        return () if place < 0 else (self.tasks[place],)

    def is_void(self) -> bool:
        """Whether its thread is gone and made no nodes."""
        thread = self.thread()
        return self.seen == 0 and self.bounded and (thread is None or not thread.is_alive())


def vars_of(tasks: Any) -> Any:
    """What a list of tasks knows beside their names."""
    return getattr(tasks, "__dict__", None)


def now() -> int:
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def is_nested() -> bool:
    """Whether a backward pass runs within a function's backward, which runs within another backward pass."""
    apply = torch.autograd.function.BackwardCFunction.apply.__code__
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        count += frame.f_code is apply
        frame = frame.f_back
    return count > 1
