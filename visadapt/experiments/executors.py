"""Engines: where runs are made, in this process, in several on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeAlias

import torch

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result, write
from visadapt.experiments.run import Run
from visadapt.experiments.train import Workplace
from visadapt.optional import require
from visadapt.training.engine import check_device

Work: TypeAlias = "Sequence[tuple[Run, Collection[str]]]"
"""Runs, and for each the keys of the results that are missing."""

Engine = Callable[[Work, Workplace, int], Iterator[Result]]


def engine_named(name: str) -> Engine:
    """The engine of a name, ``local`` or ``ray``.

    Raises:
        VisadaptError: there is none of that name.
    """
    check_choice(name, ENGINES, "engine")
    return ENGINES[name]


def make(run: Run, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
    """Makes a run's missing results, each on disk before it is given on."""
    # asked where the run is made: the driver of a cluster may lack what its nodes have
    check_device(workplace.device)
    for result in run.results(missing, workplace):
        write(result, workplace.folder)
        yield result


def local(work: Work, workplace: Workplace, processes: int) -> Iterator[Result]:
    """This process, or a pool of them."""
    if processes == 1:
        for run, missing in work:
            yield from make(run, missing, workplace)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), _settle, (threads,)) as pool:
        try:
            jobs = [pool.submit(_made, run, missing, workplace) for run, missing in work]
            for job in as_completed(jobs):
                yield from job.result()
        except BrokenProcessPool as error:
            raise VisadaptError(
                f"one of the {processes} processes died at work, as the system has it where memory runs out; finished "
                "results are kept, and the same command goes on from them, with fewer processes if need be"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def ray(work: Work, workplace: Workplace, processes: int) -> Iterator[Result]:
    """A Ray cluster (Moritz et al. 2018, arXiv 1712.05889); every node must see the folder of the results."""
    cluster = require("ray", "engine 'ray'", "visadapt[ray]")
    ours = not cluster.is_initialized()
    if ours:
        # on a cluster that is there, its processors are its own affair
        own = None if os.environ.get("RAY_ADDRESS") else processes
        _start(cluster, own)
    try:
        threads = max(1, torch.get_num_threads() // processes)
        remote = cluster.remote(num_cpus=1, max_retries=1)(_on_node)
        waiting = [remote.remote(run, missing, workplace, threads) for run, missing in work]
        while waiting:
            ready, waiting = cluster.wait(waiting)
            for results in cluster.get(ready):
                yield from results
    finally:
        if ours:
            cluster.shutdown()


def _start(cluster: Any, own: int | None, tries: int = 3) -> None:
    # Ray gives its own node half a minute to start, which a busy machine may well not keep
    try:
        cluster.init(num_cpus=own, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # Ray says by a bare one that a node was too slow
        cluster.shutdown()
        if tries == 1:
            raise VisadaptError(f"Ray could not be started: {str(error).splitlines()[0]}") from error
        _start(cluster, own, tries - 1)


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
"""By name."""


def _made(run: Run, missing: Collection[str], workplace: Workplace) -> list[Result]:
    return list(make(run, missing, workplace))


def _on_node(run: Run, missing: Collection[str], workplace: Workplace, threads: int) -> list[Result]:
    torch.set_num_threads(threads)
    return _made(run, missing, workplace)


def _settle(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> Any:
    # a pool's processes would outlive a parent that was killed, and go on working for nobody
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
