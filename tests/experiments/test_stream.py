"""The stream of runs: its order, that no place stays free, and that no result is computed twice."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.conftest import make_contender, small
from tests.report import fake_results
from visadapt import VisadaptError
from visadapt.experiments import Compare, Transfer
from visadapt.experiments.executors import Ended, Executor
from visadapt.experiments.record import Record, Result
from visadapt.experiments.run import TrainingRun
from visadapt.experiments.stream import Plan, Stream
from visadapt.experiments.train import Workspace


class Recorded(Executor):
    """Give each result at once, in the order in which the runs were begun, and keep that order.

    Args:
        places: number of runs in progress.
        last: name of a contender whose runs end after all others.
        wrong: name of a contender whose runs fail.
    """

    def __init__(self, places: int = 1, last: str = "", wrong: str = "") -> None:
        self.places, self.last, self.wrong = places, last, wrong
        self.begun: list[str] = []
        self.most = 0
        self._runs: deque[tuple[Any, Collection[str]]] = deque()

    def begin(self, run: Any, missing: Collection[str], workspace: Workspace) -> None:
        self.begun.append(f"{run.problem.name} {run.contender.name} {run.contender.recipe.lr:g} {run.seed}")
        self._runs.append((run, missing))
        self.most = max(self.most, len(self._runs))

    def collect(self) -> Iterator[Result | Ended]:
        for _ in range(len(self._runs) - 1):
            if self._runs[0][0].contender.name == self.last:
                self._runs.rotate(-1)
        run, missing = self._runs.popleft()
        if run.contender.name == self.wrong:
            yield Ended(run, VisadaptError("no good"))
            return
        for key in sorted(missing):
            result = fake_results.result(run.experiment, "resnet50", run.problem.name, run.contender.name, 1, 0)
            yield dataclasses.replace(result, key=key, score=run.contender.recipe.lr, regime=None)
        yield Ended(run)


def streamed(folder: Path, experiments: Any, executor: Recorded, **options: Any) -> Record:
    record = Record(folder)
    Stream(experiments, record, executor, Workspace(folder), say=lambda result: None, **options).run()
    return record


ONE, TWO = make_contender(name="one"), make_contender(name="two", epochs=2)
CHOSEN = dataclasses.replace(make_contender(name="chosen"), rates=(0.1, 0.2))


def test_runs_are_begun_in_the_order_of_the_experiments_and_of_their_runs(tmp_path: Path) -> None:
    executor = Recorded()
    plans = [Compare((small(data),), (ONE, TWO), (0,)) for data in ("digits", "mnist")]
    streamed(tmp_path, plans, executor)
    assert executor.begun == ["digits one 0.01 0", "digits two 0.01 0", "mnist one 0.01 0", "mnist two 0.01 0"]
    assert executor.most == 1


def test_what_depends_on_a_result_begins_when_it_arrives_and_not_when_all_have(tmp_path: Path) -> None:
    executor = Recorded(2, last="one")
    streamed(tmp_path, [Compare((small(),), (ONE, CHOSEN), (0, 1))], executor)
    assert executor.begun == [
        "digits one 0.01 0", "digits one 0.01 1", "digits chosen 0.1 0", "digits chosen 0.2 0", "digits chosen 0.2 0",
        "digits chosen 0.2 1",
    ]  # fmt: skip
    executor = Recorded(3, last="one")
    streamed(tmp_path / "again", [Compare((small(),), (ONE, CHOSEN), (0,)), Compare((small(),), (TWO,))], executor)
    # the best of two rates is an earlier experiment's, so it begins before what is left of a later one
    assert executor.begun.index("digits chosen 0.2 0") < executor.begun.index("digits two 0.01 2")


def test_all_places_are_used_and_a_later_experiment_is_asked_when_one_is_free(tmp_path: Path) -> None:
    executor, asked = Recorded(3), []

    def plans() -> Iterator[Compare]:
        for data in ("digits", "mnist", "fashion-mnist"):
            asked.append((data, len(executor.begun)))
            yield Compare((small(data),), (ONE,), (0, 1))

    streamed(tmp_path, plans(), executor)
    assert executor.most == 3
    assert asked == [("digits", 0), ("mnist", 2), ("fashion-mnist", 4)]


def test_a_result_that_two_experiments_need_is_computed_once(tmp_path: Path) -> None:
    executor = Recorded(4)
    problems = (small("digits"), small("mnist"))
    record = streamed(tmp_path, [Compare(problems, (ONE,), (0,)), Transfer(problems, ONE, (0,))], executor)
    assert executor.begun.count("digits one 0.01 0") == 2, "alone, and from the other problem's task"
    transfer = Plan(Transfer(problems, ONE, (0,)), record, None)
    transfer.ask()
    assert len(transfer.results()) == 4
    assert transfer.todo == []
    assert transfer.lacking == set()


def test_complete_experiments_are_told(tmp_path: Path) -> None:
    told: list[list[str]] = []

    def complete(experiment: Any, runs: Any) -> None:
        told.append([run.contender.name for run in runs if isinstance(run, TrainingRun)])

    plans = [Compare((small(),), (ONE,), (0,)), Compare((small(),), (TWO,), (0,)), Compare((small(),), (ONE,), (0,))]
    streamed(tmp_path, plans, Recorded(), complete=complete)
    assert told == [["one"], ["two"], ["one"]]


def test_a_run_that_fails_is_raised_or_told_and_not_tried_again(tmp_path: Path) -> None:
    plan = Compare((small(),), (ONE, CHOSEN), (0,))
    with pytest.raises(VisadaptError, match="no good"):
        streamed(tmp_path / "raised", [plan], Recorded(wrong="one"))
    failed: list[str] = []
    executor = Recorded(wrong="one")
    streamed(tmp_path / "told", [plan], executor, fail=lambda run, error: failed.append(str(error)))
    assert failed == ["no good"]
    assert executor.begun == ["digits one 0.01 0", *(f"digits chosen {rate} 0" for rate in (0.1, 0.2, 0.2))]


def test_after_the_deadline_nothing_is_begun_and_what_is_in_progress_is_finished(tmp_path: Path) -> None:
    executor, record = Recorded(2), Record(tmp_path)
    over: list[Result] = []

    class Short(Workspace):
        @property
        def is_over(self) -> bool:
            return bool(over)

    plan = Compare((small(),), (ONE, TWO), (0, 1))
    Stream([plan], record, executor, Short(tmp_path), say=over.append).run()
    assert len(executor.begun) == len(record.results) == 2
