"""Experiments: data that says which runs are wanted, and the one driver that has them made."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from visadapt.experiments.executors import engine_named
from visadapt.experiments.record import Record, Result
from visadapt.experiments.run import Found, Run
from visadapt.experiments.train import Workplace


class Experiment(ABC):
    """What is to be found out; a subclass is a frozen dataclass.

    Attributes:
        name: of the folder of its results.
    """

    name: ClassVar[str]

    @abstractmethod
    def runs(self, found: Found) -> Sequence[Run]:
        """All runs that are known to be wanted, whether made or not, given the results so far.

        It is asked again once these are made: what depends on results (a test at the best learning rate, say) is
        wanted when they are there. It must not look at anything else.
        """


def run_experiment(
    experiment: Experiment,
    results_folder: str | os.PathLike[str],
    engine: str = "local",
    processes: int = 1,
    *,
    device: str = "cpu",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Makes the results of an experiment that are not there yet.

    Each result is a file of its own that is written when it is known, so after a kill the same call goes on from
    there, with the same figures in the end. A figure that another experiment has made already is taken over.

    Args:
        experiment: what to find out.
        results_folder: of the results of all experiments.
        engine: ``local``, or ``ray`` for a Ray cluster: the one that ``RAY_ADDRESS`` names, or one on this machine.
        processes: how many work at once, each with its share of the threads.
        device: that is computed on.
        progress: whether trainings show a bar on a terminal.
        say: takes a line for each result.

    Returns:
        All results of the experiment, in the order of its runs.

    Raises:
        VisadaptError: there is no such engine; the folder holds something else; a training failed.
    """
    workplace = Workplace(Path(results_folder), device, progress)
    make = engine_named(engine)
    record = Record(results_folder)

    def found(key: str) -> Result | None:
        return record.get(experiment.name, key)

    while True:
        runs = experiment.runs(found)
        wanted = [(run, key) for run in runs for key in run.keys if found(key) is None]
        if not wanted:
            return [result for run in runs for key in run.keys if (result := found(key)) is not None]
        for run, key in wanted:
            if known := record.elsewhere(key):
                record.add(run.adopted(known))
        pending = {run.keys: run for run in runs if any(found(key) is None for key in run.keys)}
        if not pending:
            continue  # taken over, and what depends on it is wanted now
        work = [(run, frozenset(key for key in keys if found(key) is None)) for keys, run in pending.items()]
        for number, result in enumerate(make(work, workplace, processes), start=1):
            record.remember(result)
            say(f"{number:>4}  {line(result)}")


def line(result: Result) -> str:
    """A result in a line."""
    where = f"{result.network} {result.problem}"
    facts = " ".join(f"{name}={value}" for name, value in result.facts.items())
    return (
        f"{where:<22} {result.contender:<18} {facts:<24} seed {result.seed}  lr {result.lr:<6g} {result.split} "
        f"{result.metric} {result.score:.4f}  {result.seconds:6.1f} s"
    )
