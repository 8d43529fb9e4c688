"""The active task: chosen by ``activate`` or ``using``, captured where a forward begins, found again in backward.

``using`` opens a block of the running context (thread or async task). Three cases need more than a context variable:

* A generator shares the context of its caller: a block opened in one counts only while the generator runs, whichever
  thread runs it.
* A thread starts with an empty context: one that was started inside a block has to choose for itself.
* What gradient checkpointing computes again in backward, in any thread and block, belongs to the forward that it
  repeats: autograd numbers its nodes in the order of their creation, and a log holds the task from each number on.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from visadapt.errors import VisadaptError
from visadapt.runtime.blocks import BLOCKS, Block, elsewhere, frames, innermost, is_held_by, shown
from visadapt.runtime.in_use import TasksInUse, is_averaging
from visadapt.runtime.node_log import Log, Logs, now, removed
from visadapt.runtime.reservation import Reservation

AUTO = "auto"
"""Instead of a task's name: the decider chooses for each sample."""

_NUMBERS = itertools.count()

_TRACED: list[tuple[int, Any]] = []
"""The task within a forward that dynamo traces, which cannot set a context variable; no other code reads it."""


class Choices(TasksInUse):
    """The choices of tasks for one model. A copy of it (by ``deepcopy`` or pickle) starts with ``active`` only.

    Attributes:
        lock: held while tasks are added or removed, and while the model is copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self._default = Block(None)
        self._start()

    def _start(self) -> None:
        super()._start()
        self.lock = threading.RLock()
        self._number = next(_NUMBERS)
        self._held: Block | None = None
        # blocks of generators, whichever context they were opened in
        self._streams: tuple[Block, ...] = ()
        self._open: dict[int, Block] = {}
        self._relying: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._logs = Logs()
        self.reservation = Reservation()
        # a copy of the bare backbone for the decider, and the facts that it was made by
        self.listener: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._averages = is_averaging()
        self._start()

    @property
    def active(self) -> Any:
        """The task of threads without a choice of their own."""
        return self._default.tasks

    def blocks(self) -> tuple[Block | None, ...]:
        own: Block | None = getattr(self._local, "introduced", None)
        return (self._default, own, self._held, *list(self._open.values()), *self._streams)

    def choices(self) -> tuple[Any, ...]:
        own = getattr(self._local, "introduced", None)
        return self._default, own, self._held, tuple(self._open), [block.number for block in self._streams]

    def current(self) -> Any:
        """The active task of this thread: that of the innermost block, else what ``activate`` chose.

        Raises:
            VisadaptError: it cannot be known whose block it is.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._traced()
        return self._meant().tasks

    def acting(self) -> Any:
        """The task of a forward that runs now in this thread.

        Raises:
            VisadaptError: as `current`; or it repeats a forward in backward, and it cannot be known which.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._traced()
        return self._acting().tasks

    def may_be_divided(self) -> bool:
        """Whether several tasks may be active, so that `acting` has to be called."""
        block = (BLOCKS.get() or {}).get(self._number)
        tasks = (self._held or self._default if block is None else block).tasks
        return bool(self._streams) or (block is not None and block.closed) or isinstance(tasks, tuple) or tasks == AUTO

    def check_current(self) -> None:
        """Refuse a task that was removed since it was chosen.

        Called where the active task has no part in a module. Within a forward of the whole model, the check comes at
        its end.

        Raises:
            VisadaptError: it was removed.
        """
        if torch.compiler.is_dynamo_compiling():
            tasks = self._traced()
            if isinstance(tasks, str) and tasks != AUTO and tasks not in self.tasks:
                raise removed(tasks)
        elif not (block := self._acting(noted=False)).captured:
            self.check(block)

    def check(self, block: Block) -> None:
        """Refuse a choice of tasks that are no longer the model's.

        Raises:
            VisadaptError: one was removed.
        """
        for name, task in block.taken:
            if task is None or self.tasks.get(name) is not task:
                raise removed(name)

    def in_use(self) -> Any:
        """The active task of this thread, checked.

        Raises:
            VisadaptError: as `current`; or it was removed.
        """
        self._drop_stale()
        block = self._meant()
        self.check(block)
        return block.tasks

    def choose(self, tasks: Any) -> None:
        """Choose for all threads without a block."""
        self._drop_stale()
        self._relying.add(threading.current_thread())
        self._default = Block(tasks, self._taken(tasks))
        self.follow(self._default)
        self._note_choice()

    def introduce(self, task: str) -> None:
        """Activate a new task in this thread, and in all others if none of them relies on another task."""
        block = Block(task, self._taken(task))
        here = threading.current_thread()
        self._relying.add(here)
        if any(thread is not here and thread.is_alive() for thread in list(self._relying)):
            self._local.introduced = block
        else:
            self._default = block
        self._note_choice()

    def withdraw(self, task: str) -> None:
        """Choose the bare backbone instead of a task that was removed."""
        self._logs.forget(task)
        introduced: Block | None = getattr(self._local, "introduced", None)
        if introduced is not None and introduced.tasks == task:
            self._local.introduced = None
        tasks = self.active
        if tasks == task or (isinstance(tasks, tuple) and task in tasks):
            self._default = Block(None)
            self._note_choice()

    @contextlib.contextmanager
    def only(self, tasks: Any, owner: FrameType | None = None) -> Iterator[None]:
        """Make these tasks active in a block of the user's.

        Args:
            tasks: a name, None, or one per sample.
            owner: the frame of the generator that opens the block, if one does.
        """
        self._drop_stale()
        block = Block(tasks, self._taken(tasks), self._top(), owner, graph=torch._C._current_graph_task_id())
        block.waiting = elsewhere(self._streams)
        block.opener, block.threads = threading.current_thread(), tuple(threading.enumerate())
        self.follow(block)
        if owner is None:
            self._open[block.number] = block
            self._set(block)
        else:
            with self.lock:
                self._streams = (*self._streams, block)
        self._note(tasks)
        try:
            yield
        finally:
            self._end(block)

    @contextlib.contextmanager
    def within(self, tasks: Any) -> Iterator[None]:
        """Make these tasks active in a part of a forward."""
        if torch.compiler.is_dynamo_compiling():
            _TRACED.append((self._number, tasks))
            try:
                yield
            finally:
                _TRACED.pop()
            return
        graph, below = torch._C._current_graph_task_id(), self._top()
        # the tasks are some of those of the forward, which are checked at its end
        self._set(Block(tasks, (), below, captured=True, graph=graph))
        if graph == -1:
            self._note(tasks)
        try:
            yield
        finally:
            self._set(below)
            if graph == -1:
                self._note_choice()

    def begin(self, call: FrameType) -> Block:
        """Capture the active task, where a forward of the whole model begins.

        Args:
            call: the frame of its call.

        Raises:
            VisadaptError: as `acting`; or the task was removed.
        """
        self.reservation.check()
        self._drop_stale()
        chosen, graph = self._acting(noted=False), torch._C._current_graph_task_id()
        self.check(chosen)
        if graph == -1:
            self._log().add(chosen.tasks)
            self.note_forward(chosen.taken)
        block = Block(chosen.tasks, chosen.taken, self._top(), call, captured=True, graph=graph)
        self._set(block)
        return block

    def finish(self, caller: FrameType) -> Block | None:
        """Release the captured task, where the forward ends.

        Args:
            caller: the frame of its call, or the one around that if it raised an exception.

        Returns:
            The captured block; None if the forward did not begin.
        """
        block = self._top()
        if block is None or block.owner is None or caller not in (block.owner, block.owner.f_back):
            return None
        if block.graph == -1:
            self._log().seen = now()
        self._set(block.below)
        return block

    def _drop_stale(self) -> None:
        """Forget what was captured by a forward that was interrupted before its end."""
        block = top = self._top()
        while block is not None and block.captured and block.owner is not None and block.owner not in set(frames()):
            block = block.below
        if block is not top:
            self._set(block)

    def held(self) -> Choices:
        """The choices of a replica of the model, whose task stays the one that is active here and now."""
        twin = type(self).__new__(type(self))
        twin.__dict__ = {**self.__dict__, "_held": self._meant()}
        return twin

    def _taken(self, tasks: Any) -> tuple[tuple[str, Any], ...]:
        names = dict.fromkeys(tasks) if isinstance(tasks, tuple) else (tasks,)
        known = self.tasks
        return tuple((name, known.get(name)) for name in names if name is not None and name != AUTO)

    def _traced(self) -> Any:
        """The same while dynamo makes a graph."""
        if self._held is not None:
            return self._held.tasks
        for number, tasks in reversed(_TRACED):
            if number == self._number:
                return tasks
        if self._streams:
            raise VisadaptError(
                "a compiled model cannot tell which of several generators runs it, and one is inside using(): call the "
                "model without torch.compile, or within a using() of a plain function"
            )
        blocks = BLOCKS.get()
        block = None if blocks is None else blocks.get(self._number)
        return self._default.tasks if block is None else block.tasks

    def _acting(self, noted: bool = True) -> Block:
        block, graph = (BLOCKS.get() or {}).get(self._number), torch._C._current_graph_task_id()
        if block is not None and block.captured and block.graph == graph and not self._streams:
            return block
        if self._held is not None:
            return self._held
        if graph != -1:
            if block is not None and block.graph == graph:
                return block
            tasks = self._logs.repeated(graph)
            return Block(tasks, self._taken(tasks), graph=graph)
        meant = self._meant()
        if noted and not meant.captured:
            # a module called by itself: when its nodes end is not seen
            self._note(meant.tasks).bounded = False
            self.note_forward(meant.taken)
        return meant

    def _top(self) -> Block | None:
        blocks = BLOCKS.get()
        return None if blocks is None else blocks.get(self._number)

    def _set(self, block: Block | None) -> None:
        blocks = {key: value for key, value in (BLOCKS.get() or {}).items() if key != self._number}
        if block is not None:
            blocks[self._number] = block
        BLOCKS.set(blocks or None)

    def _end(self, block: Block) -> None:
        self._open.pop(block.number, None)
        if block.owner is not None:
            with self.lock:
                self._streams = tuple(other for other in self._streams if other is not block)
        top = self._top()
        while top is not None and top is not block and top.captured:
            # left by a forward that was interrupted
            top = top.below
        if top is block:
            # not closed: an async task that was started in it still uses it
            top = block.below
        else:
            block.closed = True
        while top is not None and top.closed:
            top = top.below
        self._set(top)
        self._note_choice()

    def _meant(self) -> Block:
        """The innermost block of this thread."""
        block = self._top()
        while block is not None and block.closed:
            # left before a block inside it was
            block = block.below
        if self._streams:
            block = innermost(block, self._streams, self._default.tasks)
        if block is not None:
            return block
        if self._held is not None:
            return self._held
        return self._without_choice()

    def _without_choice(self) -> Block:
        default, here = self._default, threading.current_thread()
        introduced: Block | None = getattr(self._local, "introduced", None)
        if introduced is not None and introduced.number > default.number:
            return introduced
        self._relying.add(here)
        for block in list(self._open.values()):
            other = block.number > default.number and block.tasks != default.tasks
            if other and here not in block.threads and is_held_by(block.opener, here):
                raise VisadaptError(
                    f"this thread was started inside using(model, {shown(block.tasks)}) of another thread, and chose "
                    "no task itself: call using() in the thread that runs the model, too"
                )
        return default

    def _note(self, tasks: Any) -> Log:
        """Write to this thread's log that these tasks are active from here on."""
        log = self._log()
        if torch._C._current_graph_task_id() == -1:
            log.seen = now()
            log.add(tasks)
        return log

    def _note_choice(self) -> None:
        if self._logs.here() is not None:
            self._note(self._meant_or_none())

    def _log(self) -> Log:
        return self._logs.here() or self._logs.begun(self._meant_or_none())

    def _meant_or_none(self) -> Any:
        try:
            return self._meant().tasks
        except VisadaptError:
            return None


_NOT_COPIED = {"_number", "_held", "_streams", "_open", "_relying", "_local", "_logs", "listener", "lock"}
_NOT_COPIED |= {"reservation"}
