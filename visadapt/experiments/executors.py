"""Engines: execute runs in this process, in parallel processes on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeAlias

import torch

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result, write
from visadapt.experiments.run import Run
from visadapt.experiments.train import Workspace
from visadapt.optional import require
from visadapt.training.engine import check_device

Work: TypeAlias = "Sequence[tuple[Run, Collection[str]]]"
"""Runs, each with the keys of its missing results."""

Engine = Callable[[Work, Workspace, int], Iterator[Result]]


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


def run_locally(work: Work, workspace: Workspace, processes: int) -> Iterator[Result]:
    """Execute runs in this process, or in a pool of processes."""
    if processes == 1:
        for run, missing in work:
            yield from execute(run, missing, workspace)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _exit_with_parent) as pool:
        try:
            threads = _threads_per_process(processes)
            yield from _completed([pool.submit(_execute_all, run, keys, workspace, threads) for run, keys in work])
        except BrokenProcessPool as error:
            raise VisadaptError(
                f"one of the {processes} processes was killed, possibly because memory ran out; finished results are "
                "kept, and the same command resumes from them (use fewer processes if memory is short)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_on_ray(work: Work, workspace: Workspace, processes: int) -> Iterator[Result]:
    """Execute runs on a Ray cluster (Moritz et al. 2018, arXiv 1712.05889); all nodes need the results' folder."""
    ray = require("ray", "engine 'ray'", "visadapt[ray]")
    started_here = not ray.is_initialized()
    if started_here:
        # an existing cluster knows its own number of CPUs
        _start(ray, None if os.environ.get("RAY_ADDRESS") else processes)
    try:
        task, threads = ray.remote(num_cpus=1, max_retries=1)(_execute_all), _threads_per_process(processes)
        yield from _completed([task.remote(run, keys, workspace, threads).future() for run, keys in work])
    finally:
        if started_here:
            ray.shutdown()


def _start(ray: Any, num_cpus: int | None, tries: int = 3) -> None:
    # Ray waits 30 seconds for its own node to start, which is too short on a busy machine
    try:
        ray.init(num_cpus=num_cpus, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # Ray raises a bare Exception if a node is too slow
        ray.shutdown()
        if tries == 1:
            raise VisadaptError(f"Ray could not be started: {str(error).splitlines()[0]}") from error
        _start(ray, num_cpus, tries - 1)


ENGINES: dict[str, Engine] = {"local": run_locally, "ray": run_on_ray}
"""Engines by name."""


def _threads_per_process(processes: int) -> int:
    return max(1, torch.get_num_threads() // processes)


def _completed(futures: Sequence[Future[list[Result]]]) -> Iterator[Result]:
    for future in as_completed(futures):
        yield from future.result()


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

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
