"""The driver of experiments: a stream of runs, which are begun as soon as they are known and a process is free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from visadapt.experiments.executors import Ended, Executor
from visadapt.experiments.record import Record, Result
from visadapt.experiments.run import Lookup, Run
from visadapt.experiments.train import Workspace


class Experiment(Protocol):
    """What a stream needs of a `visadapt.experiments.base.Experiment`."""

    @property
    def name(self) -> str:
        """Name of the experiment and of the folder of its results."""

    def runs(self, lookup: Lookup) -> Sequence[Run]:
        """Return all runs that are known to be wanted given the results so far."""


class Stream:
    """The runs of experiments, in the order of the experiments and of their runs.

    An experiment is asked for its runs again when a result that it lacks arrives, and the next one is first asked when
    those before it leave a place free. A result is computed once, also if several experiments need it.

    Args:
        experiments: the experiments, the most important first.
        record: the results so far.
        executor: executes the runs.
        workspace: passed to the runs.
        say: called with each new result.
        complete: called with each experiment of which no result is missing, and its runs.
        fail: called with a run that failed, and its error; None to raise it.
    """

    def __init__(
        self,
        experiments: Iterable[Experiment],
        record: Record,
        executor: Executor,
        workspace: Workspace,
        *,
        say: Callable[[Result], None],
        complete: Callable[[Experiment, Sequence[Run]], None] = lambda experiment, runs: None,
        fail: Callable[[Run, Exception], None] | None = None,
    ) -> None:
        self.record, self.executor, self.workspace = record, executor, workspace
        self.say, self.complete, self.fail = say, complete, fail
        self._waiting = iter(experiments)
        self._open: list[Plan] = []
        # keys of missing results whose runs were begun; those of a run that failed stay, so that it is not begun again
        self._begun: set[str] = set()
        self._in_progress = 0

    def run(self) -> None:
        """Compute all missing results; after the deadline only those of runs that were begun before.

        Raises:
            VisadaptError: a run failed, or one of the processes was killed.
        """
        self._begin()
        while self._in_progress:
            arrived = set()
            for outcome in self.executor.collect():
                if isinstance(outcome, Result):
                    self.record.remember(outcome)
                    arrived.add(outcome.key)
                    self.say(outcome)
                else:
                    self._end(outcome)
            self._refresh(arrived)
            self._begin()

    def _end(self, ended: Ended) -> None:
        self._in_progress -= 1
        if ended.error is None:
            return
        if self.fail is None:
            raise ended.error
        self.fail(ended.run, ended.error)

    def _refresh(self, arrived: set[str]) -> None:
        for plan in self._open:
            if not plan.lacking.isdisjoint(arrived):
                plan.ask()
        for plan in [plan for plan in self._open if not plan.lacking]:
            self._open.remove(plan)
            self.complete(plan.experiment, [run for run, _ in plan.runs])

    def _begin(self) -> None:
        """Begin runs while there are places and known runs."""
        while self._in_progress < self.executor.places and not self.workspace.is_over:
            work = next(self._ready(), None)
            if work is None:
                return
            run, missing = work
            self._begun |= missing
            self._in_progress += 1
            self.executor.begin(run, missing, self.workspace)

    def _ready(self) -> Iterator[tuple[Run, frozenset[str]]]:
        """Yield runs whose missing results are not being computed, in order of priority."""
        for plan in self._open:
            yield from (work for work in plan.todo if self._begun.isdisjoint(work[1]))
        for experiment in self._waiting:
            plan = Plan(experiment, self.record, self.workspace.regime)
            plan.ask()
            self._open.append(plan)
            self._refresh(set())
            yield from (work for work in plan.todo if self._begun.isdisjoint(work[1]))


class Plan:
    """The runs of one experiment that are known so far.

    Args:
        experiment: the experiment.
        record: the results so far.
        regime: regime of the results that count.

    Attributes:
        runs: all runs, each with its keys.
        todo: runs with missing results, and the keys of these.
        lacking: keys of missing results, whether of these runs or of others that were looked up.
    """

    def __init__(self, experiment: Experiment, record: Record, regime: str | None) -> None:
        self.experiment, self.record, self.regime = experiment, record, regime
        self.runs: list[tuple[Run, tuple[str, ...]]] = []
        self.todo: list[tuple[Run, frozenset[str]]] = []
        self.lacking: set[str] = set()

    def ask(self) -> None:
        """Ask the experiment for its runs, and take over results that another experiment has computed."""
        while True:
            self.lacking = set()
            self.runs = [(run, run.keys) for run in self.experiment.runs(self._lookup)]
            missing = {keys: (run, frozenset(key for key in keys if not self._lookup(key))) for run, keys in self.runs}
            self.todo = [(run, keys) for run, keys in missing.values() if keys]
            known = [(run, result) for run, keys in self.todo for key in keys if (result := self._elsewhere(key))]
            if not known:
                return
            for run, result in known:
                self.record.add(run.adopt(result))

    def results(self) -> list[Result]:
        """Return the results that exist, in the order of the runs."""
        return [result for _, keys in self.runs for key in keys if (result := self._lookup(key)) is not None]

    def _lookup(self, key: str) -> Result | None:
        result = self._of_regime(self.record.get(self.experiment.name, key))
        if result is None:
            self.lacking.add(key)
        return result

    def _elsewhere(self, key: str) -> Result | None:
        return self._of_regime(self.record.find(key))

    def _of_regime(self, result: Result | None) -> Result | None:
        return result if result is not None and result.regime == self.regime else None
