"""Blocks of ``using``: choices of tasks that are open, in a context or in a generator."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextvars import ContextVar
from multiprocessing.pool import ThreadPool
from types import FrameType
from typing import Any

import torch

from visadapt.errors import VisadaptError

BLOCKS: ContextVar[dict[int, Block] | None] = ContextVar("visadapt_using", default=None)
"""The innermost block of each model, by the number of its registry."""

_NUMBERS = itertools.count()


class Block:
    """One choice of tasks, from its begin to its end.

    Args:
        tasks: the chosen tasks: a name, None, or one per sample.
        taken: the `Task` of each name at that time.
        below: the block around this one.
        owner: the frame of the generator that opened it, None if a function or coroutine did; if a forward captured
            it, the frame of its call.
        captured: whether a forward opened it, to keep the tasks that were chosen where it began.
        graph: the backward pass that it was opened in, −1 outside of one.

    Attributes:
        number: the order in which blocks were opened.
        records: whether autograd recorded when it was opened.
        waiting: blocks of generators that did not run here when this one was opened.
        opener: the thread that opened it.
        threads: all threads at that time, for a block in which threads may be started.
    """

    def __init__(
        self,
        tasks: Any,
        taken: tuple[tuple[str, Any], ...] = (),
        below: Block | None = None,
        owner: FrameType | None = None,
        captured: bool = False,
        graph: int = -1,
    ) -> None:
        self.tasks = tasks
        self.taken = taken
        self.below = below
        self.owner = owner
        self.captured = captured
        self.graph = graph
        self.number = next(_NUMBERS)
        self.records = torch.is_grad_enabled()
        self.closed = False
        self.waiting: tuple[Block, ...] = ()
        self.opener: threading.Thread | None = None
        self.threads: tuple[threading.Thread, ...] = ()


def generator_of(frame: FrameType | None) -> FrameType | None:
    """The frame of the generator whose code opened a block, None if it was a function's or coroutine's.

    The generator of a ``contextlib.contextmanager`` is suspended while its block runs: the code of the block counts.

    Args:
        frame: where the block is opened.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == contextlib.__name__:
            frame = frame.f_back
            continue
        if not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            return None
        driver = frame.f_back
        if driver is None or driver.f_globals.get("__name__") != contextlib.__name__:
            return frame
        frame = driver
    return None


def frames(frame: FrameType | None = None) -> Iterator[FrameType]:
    """The frames of a stack, the innermost first.

    Args:
        frame: the innermost; None for the caller's.
    """
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_held_by(holder: threading.Thread | None, thread: threading.Thread) -> bool:
    """Whether code in one thread holds another thread in a variable, as code does that waits for one it started."""
    stack = None if holder is None else sys._current_frames().get(holder.ident or 0)
    return stack is not None and any(_holds(value, thread) for f in frames(stack) for value in _locals(f))


def _locals(frame: FrameType) -> tuple[Any, ...]:
    return tuple(dict(frame.f_locals).values())


def _holds(value: Any, thread: threading.Thread) -> bool:
    if isinstance(value, Executor | ThreadPool):
        value = getattr(value, "_threads", None) or getattr(value, "_pool", None) or ()
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return value is thread or any(each is thread for each in tuple(several))


def elsewhere(streams: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks of generators that do not run in this thread."""
    if not streams:
        return ()
    here = set(map(id, frames()))
    return tuple(block for block in streams if id(block.owner) not in here)


def innermost(top: Block | None, streams: tuple[Block, ...], default: Any) -> Block | None:
    """The innermost block of a context and of the generators that run in it.

    Args:
        top: the context's innermost block.
        streams: blocks of generators.
        default: the tasks without a block.

    Raises:
        VisadaptError: there is none, but a generator of this thread waits inside one.
    """
    owners = {id(block.owner) for block in streams}
    running = next((frame for frame in frames() if id(frame) in owners), None)
    if running is not None:
        own = max((block for block in streams if block.owner is running), key=lambda block: block.number)
        # opened within the context's block, or called from there after it waited
        if top is None or own.number > top.number or own in top.waiting:
            return own
    if top is None:
        here = threading.current_thread()
        for block in streams:
            waits = block.owner is not None and block.owner.f_back is None
            if waits and block.opener is here and block.tasks != default:
                raise VisadaptError(
                    f"a generator waits inside using(model, {shown(block.tasks)}): it cannot be known whether what "
                    "runs outside of it means that task too; name the task there by another using()"
                )
    return top


def shown(tasks: Any) -> str:
    """Tasks as they are named in messages."""
    return "[…]" if isinstance(tasks, tuple) else repr(tasks)
