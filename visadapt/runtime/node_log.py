"""The tasks that were active when autograd nodes were made: one log per thread, by the nodes' sequence numbers."""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from types import FrameType
from typing import Any

import torch

from visadapt.errors import VisadaptError


class Removed(str):
    """The name of a task that was removed, in place of the tasks that were active with it."""


class Log:
    """The active tasks of one thread, by the sequence numbers of the autograd nodes made since.

    Attributes:
        starts: ascending numbers.
        tasks: the active tasks from each number on.
        seen: the number when the thread last chose a task or ended a forward of the model.
        bounded: whether all nodes of the model have numbers below ``seen``, except those of a forward under way.
        thread: the thread of this log.
    """

    LONGEST = 4096

    def __init__(self, tasks: Any) -> None:
        self.starts = [0]
        self.tasks = [tasks]
        self.seen = 0
        self.bounded = True
        self._lock = threading.Lock()
        self.thread = weakref.ref(threading.current_thread())

    def add(self, tasks: Any) -> None:
        """Note that ``tasks`` are active from ``seen`` on."""
        last = self.tasks[-1]
        if last is tasks or (type(last) is type(tasks) and last == tasks and vars_of(last) == vars_of(tasks)):
            return
        with self._lock:
            if self.starts[-1] >= self.seen:
                self.tasks[-1] = tasks
                return
            self.starts.append(self.seen)
            self.tasks.append(tasks)
            if len(self.starts) > self.LONGEST:
                del self.starts[: self.LONGEST // 2], self.tasks[: self.LONGEST // 2]

    def forget(self, task: str) -> None:
        """Note that a task was removed: what it computed cannot be computed again, whatever gets its name."""
        with self._lock:
            for place, tasks in enumerate(self.tasks):
                if tasks == task or (isinstance(tasks, tuple) and task in tasks):
                    self.tasks[place] = Removed(task)

    def at(self, number: int) -> tuple[Any, ...] | None:
        """The active tasks when the node of that number was made: empty if forgotten, None if none was made here."""
        own = self.thread() is threading.current_thread()
        if self.bounded and number >= (now() if own else self.seen):
            return None
        place = bisect.bisect_right(self.starts, number) - 1
        return () if place < 0 else (self.tasks[place],)

    def is_void(self) -> bool:
        """Whether its thread has ended and made no nodes."""
        thread = self.thread()
        return self.seen == 0 and self.bounded and (thread is None or not thread.is_alive())


class Logs:
    """The logs of all threads that run a model."""

    def __init__(self) -> None:
        self.all: list[Log] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def here(self) -> Log | None:
        """This thread's log, if there is one."""
        log: Log | None = getattr(self._local, "log", None)
        return log

    def begun(self, tasks: Any) -> Log:
        """This thread's log, started with these tasks if there is none."""
        log = self.here()
        if log is None:
            log = self._local.log = Log(tasks)
            with self._lock:
                self.all = [*(log for log in self.all if not log.is_void()), log]
        return log

    def forget(self, task: str) -> None:
        """Forget a task that was removed."""
        for log in self.all:
            log.forget(task)

    def repeated(self, graph: int) -> Any:
        """The tasks of the forward that is repeated in a backward pass.

        Args:
            graph: number of the backward pass.

        Raises:
            VisadaptError: a task was removed since; threads with different active tasks have nodes of the same number.
        """
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        last: tuple[Any, Any] | None = getattr(self._local, "repeated", None)
        if last is not None and last[0] == (graph, number):
            return last[1]
        if last is not None and isinstance(node, torch.autograd.function.BackwardCFunction) and _is_nested():
            # made while the enclosing checkpoint was repeated, in this thread
            tasks = last[1]
        else:
            found = [tasks for log in self.all if (tasks := log.at(number)) is not None]
            if number < 0 or not found or any(each != found[0] for each in found) or not found[0]:
                raise VisadaptError(
                    "a part of the model is computed again in backward (gradient checkpointing), and it cannot be "
                    "known which task its forward was for: several threads run this model with gradients. Train in one "
                    "thread, or evaluate under torch.no_grad()"
                )
            (tasks,) = found[0]
            if isinstance(tasks, Removed):
                raise removed(tasks)
        self._local.repeated = ((graph, number), tasks)
        return tasks


def removed(name: str) -> VisadaptError:
    """The error for a task that was removed since it was chosen."""
    return VisadaptError(f"task {str(name)!r} was removed while it was in use")


def vars_of(tasks: Any) -> Any:
    """The attributes of a list of tasks beside their names."""
    return getattr(tasks, "__dict__", None)


def now() -> int:
    """The number that the next node of this thread will have."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _is_nested() -> bool:
    """Whether a backward pass runs within a function's backward, which runs within another backward pass."""
    apply = torch.autograd.function.BackwardCFunction.apply.__code__
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        count += frame.f_code is apply
        frame = frame.f_back
    return count > 1
