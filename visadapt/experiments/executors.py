"""Engines: execute runs in this process, in parallel processes on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from typing import Any, TypeAlias

import torch

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError, first_line
from visadapt.experiments.record import Result, write
from visadapt.experiments.run import Run
from visadapt.experiments.train import Workspace
from visadapt.optional import require
from visadapt.training.engine import check_device


@dataclass(frozen=True, eq=False)
class Ended:
    """The end of a run.

    Attributes:
        run: the run.
        error: why it failed; None if it did not.
    """

    run: Run
    error: Exception | None = None


class Executor(ABC):
    """Executes runs; one serves any number of experiments.

    Attributes:
        places: number of runs to begin before the results of one are collected.
    """

    places: int = 1

    @abstractmethod
    def begin(self, run: Run, missing: Collection[str], workspace: Workspace) -> None:
        """Begin to compute the missing results of a run; each is written to disk as soon as it is known."""

    @abstractmethod
    def collect(self) -> Iterator[Result | Ended]:
        """Wait until a run that was begun has ended; yield its results, then its end."""


Engine = Callable[[int], AbstractContextManager[Executor]]
"""Opens an executor of so many processes, and ends its processes when the context is left."""


def get_engine(name: str) -> Engine:
    """Return the engine ``local`` or ``ray``.

    Raises:
        VisadaptError: the engine is unknown.
    """
    check_choice(name, ENGINES, "engine")
    return ENGINES[name]


def execute(run: Run, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
    """Compute a run's missing results, and write each to disk before it is yielded; none after the deadline."""
    # checked where the run is executed: a cluster's driver may lack the devices of its nodes
    check_device(workspace.device)
    if workspace.is_over:
        return
    for result in run.results(missing, workspace):
        write(result, workspace.folder)
        yield result


class InProcess(Executor):
    """Executes runs in this process, one at a time, each when it is collected."""

    def __init__(self) -> None:
        self._begun: deque[tuple[Run, Collection[str], Workspace]] = deque()

    def begin(self, run: Run, missing: Collection[str], workspace: Workspace) -> None:
        self._begun.append((run, missing, workspace))

    def collect(self) -> Iterator[Result | Ended]:
        work = self._begun.popleft()
        try:
            yield from execute(*work)
        except Exception as error:  # the caller decides what follows from it
            yield Ended(work[0], error)
        else:
            yield Ended(work[0])


Submit: TypeAlias = "Callable[[Run, Collection[str], Workspace], Future[list[Result]]]"


class Parallel(Executor):
    """Executes several runs at once in other processes.

    Args:
        places: number of runs to begin before the results of one are collected.
        submit: begins a run elsewhere.
    """

    def __init__(self, places: int, submit: Submit) -> None:
        self.places, self._submit = places, submit
        self._runs: dict[Future[list[Result]], Run] = {}

    def begin(self, run: Run, missing: Collection[str], workspace: Workspace) -> None:
        self._runs[self._submit(run, missing, workspace)] = run

    def collect(self) -> Iterator[Result | Ended]:
        done, _ = wait(self._runs, return_when=FIRST_COMPLETED)
        for future in done:
            run, error = self._runs.pop(future), future.exception()
            if error is None:
                yield from future.result()
            elif not isinstance(error, Exception) or isinstance(error, BrokenProcessPool):
                raise error
            yield Ended(run, error)


@contextmanager
def open_locally(processes: int) -> Iterator[Executor]:
    """Execute runs in this process or, if there are to be several, in a pool of processes."""
    if processes == 1:
        yield InProcess()
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _exit_with_parent) as pool:
        threads = _threads_per_process(processes)
        try:
            yield Parallel(processes, lambda run, missing, work: pool.submit(_execute_all, run, missing, work, threads))
        except BrokenProcessPool as error:
            raise VisadaptError(
                f"one of the {processes} processes was killed, possibly because memory ran out; finished results are "
                "kept, and the same command resumes from them (use fewer processes if memory is short)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def open_ray(processes: int) -> Iterator[Executor]:
    """Execute runs on a Ray cluster (Moritz et al. 2018, arXiv 1712.05889); all nodes need the results' folder."""
    ray = require("ray", "engine 'ray'", "visadapt[ray]")
    threads = _threads_per_process(processes)
    with ExitStack() as stack:

        @cache
        def task() -> Any:
            """Connect to the cluster when there is something to do on it."""
            if not ray.is_initialized():
                stack.callback(ray.shutdown)
                # an existing cluster knows its own number of CPUs
                _start(ray, None if os.environ.get("RAY_ADDRESS") else processes)
            return ray.remote(num_cpus=1, max_retries=1)(_execute_all)

        # the cluster has a queue of its own
        yield Parallel(sys.maxsize, lambda *work: task().remote(*work, threads).future())


def _start(ray: Any, num_cpus: int | None, tries: int = 3) -> None:
    # Ray waits 30 seconds for its own node to start, which is too short on a busy machine
    try:
        ray.init(num_cpus=num_cpus, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # Ray raises a bare Exception if a node is too slow
        ray.shutdown()
        if tries == 1:
            raise VisadaptError(f"Ray could not be started: {first_line(error)}") from error
        _start(ray, num_cpus, tries - 1)


ENGINES: dict[str, Engine] = {"local": open_locally, "ray": open_ray}
"""Engines by name."""


def _threads_per_process(processes: int) -> int:
    return max(1, torch.get_num_threads() // processes)


def _execute_all(run: Run, missing: Collection[str], workspace: Workspace, threads: int) -> list[Result]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return list(execute(run, missing, workspace))
    finally:
        torch.set_num_threads(before)  # a cluster gives the process to others


def _exit_with_parent() -> None:
    """Let a pool's process exit when its parent is killed; it would otherwise finish its work, or wait for ever."""
    parent = parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()
