"""Experiments: descriptions of the wanted runs, and the driver that executes them."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from visadapt.arguments import check_argument, check_fields, takes
from visadapt.checks import check_count
from visadapt.errors import VisadaptError
from visadapt.experiments.executors import get_engine
from visadapt.experiments.record import Record, Result
from visadapt.experiments.run import Lookup, Run
from visadapt.experiments.stream import Plan, Stream
from visadapt.experiments.train import Workspace


class Experiment(ABC):
    """Base class of experiments; a subclass is a frozen dataclass.

    Attributes:
        name: name of the experiment and of the folder of its results.

    Examples:
        >>> from visadapt.experiments import Compare, Experiment
        >>> issubclass(Compare, Experiment), Compare.name
        (True, 'compare')
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_numbers(getattr(self, field.name), field.name)

    @abstractmethod
    def runs(self, lookup: Lookup) -> Sequence[Run]:
        """Return all runs that are known to be wanted given the results so far, whether finished or not.

        Called again whenever a result that it lacked exists: runs that depend on results (such as a test at the best
        learning rate) are returned once those results exist. The first are executed first. Must not depend on anything
        but ``lookup``.

        Args:
            lookup: returns the result of a key, or None if it does not exist yet.
        """


def check_numbers(value: Any, name: str) -> None:
    """Refuse negative seeds, and other numbers that are not positive; problems and seeds must be given."""
    if name in ("problems", "seeds") and not value:
        raise VisadaptError(f"{name} must have at least one entry")
    for each in value if isinstance(value, tuple | list) else (value,):
        if isinstance(each, int | float) and not isinstance(each, bool):
            check_argument(each, float, name)
            if each < 0 or (each == 0 and name != "seeds"):
                raise VisadaptError(f"{name} must be {'at least 0' if name == 'seeds' else 'positive'}, got {each!r}")


@takes()
def run_experiment(
    experiment: Experiment,
    results_folder: str | os.PathLike[str],
    engine: str = "local",
    processes: int = 1,
    *,
    device: str = "cpu",
    progress: bool = False,
    regime: str | None = None,
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Compute the results of an experiment that do not exist yet.

    Each result is written to its own file as soon as it is known: an interrupted experiment resumes when called again,
    and ends with the same figures. Results that another experiment has already computed are reused.

    Args:
        experiment: the experiment to run.
        results_folder: folder for the results of all experiments.
        engine: ``local``, or ``ray`` for a Ray cluster: the one at ``RAY_ADDRESS``, or a new one on this machine.
        processes: number of parallel processes, which share the CPU threads.
        device: device to compute on.
        progress: show a progress bar per training run on a terminal.
        regime: name that results carry (see `Result`); existing results of another one are not used.
        deadline: value of ``time.time()`` from which no run is begun; those in progress are finished.
        say: called with one line per new result.

    Returns:
        All results of the experiment, in the order of its runs; those that exist if the deadline passed.

    Raises:
        VisadaptError: the engine is unknown, the deadline is negative, the folder holds files that are not results,
            or a training run failed.

    Examples:
        >>> from visadapt.experiments import Compare, Contender, problem, run_experiment
        >>> sizes = {"train": 20, "validation": 10, "test": 10, "size": 16, "options": (("pretrained", False),)}
        >>> digits = problem("timm/test_resnet", "digits", **sizes)
        >>> probe = Contender("probe", visadapt.Linear(), Recipe(epochs=1), norms="frozen")
        >>> experiment = Compare((digits,), (probe,), seeds=(0,))
        >>> results = run_experiment(experiment, "results", say=lambda line: None)
        >>> [(result.contender, result.split) for result in results]
        [('probe', 'test')]
    """
    check_count(processes, "processes")
    if deadline is not None and deadline < 0:
        raise VisadaptError(f"deadline must be a value of time.time(), which is 0 or more, got {deadline!r}")
    workspace = Workspace(Path(results_folder), device, progress, regime, deadline)
    open_executor = get_engine(engine)
    record = Record(results_folder)
    number = 0

    def numbered(result: Result) -> None:
        nonlocal number
        number += 1
        say(f"{number:>4}  {result_line(result)}")

    with open_executor(processes) as executor:
        Stream([experiment], record, executor, workspace, say=numbered).run()
    plan = Plan(experiment, record, regime)
    plan.ask()
    return plan.results()


def result_line(result: Result) -> str:
    """Format a result as one line of text."""
    where = f"{result.network} {result.problem}"
    facts = " ".join(f"{name}={value}" for name, value in result.facts.items())
    return (
        f"{where:<22} {result.contender:<18} {facts:<24} seed {result.seed}  lr {result.lr:<6g} {result.split} "
        f"{result.metric} {result.score:.4f}  {result.seconds:6.1f} s"
    )
