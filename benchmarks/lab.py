"""Where the evidence is computed: a stream of training runs over all stages, until the budget is used up."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from benchmarks.regimes import Regime
from visadapt.experiments import Experiment, Result, write_csv
from visadapt.experiments.base import result_line
from visadapt.experiments.executors import get_engine
from visadapt.experiments.record import Record
from visadapt.experiments.run import Run
from visadapt.experiments.stream import Stream
from visadapt.experiments.train import Workspace

LARGE = 20_000_000
"""Bytes from which the task files of a finished experiment are deleted: those of full fine-tuning."""

EVERY = 20.0
"""Seconds after which new results are published."""

GRACE = 5.0
"""Seconds after the end of the budget that training runs in progress have to finish."""


TOLERATED = 10
"""Runs that may fail before all are ended: a process whose device is lost would fail one after another."""


class Over(BaseException):
    """The budget is used up or the process is asked to end; training runs in progress are abandoned."""


@dataclass
class Lab:
    """The folder, processes, device and regime that experiments run with, and the CSV file of their results.

    Attributes:
        folder: folder of the results.
        out: CSV file of all results of the regime.
        processes: number of parallel processes.
        device: device to compute on.
        regime: sizes, epochs and precision.
        deadline: value of ``time.time()`` from which no run is begun.
        failed: one line per run that failed.
    """

    folder: Path
    out: Path
    processes: int
    device: str
    regime: Regime
    deadline: float | None = None
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.record = Record(self.folder)
        self.began = time.time()
        self._new = 0
        self._published = -1

    def run(self, experiments: Iterable[Experiment]) -> None:
        """Compute the missing results of experiments, the first ones first, and publish them at intervals.

        A run that fails does not end the others, unless many do.

        Raises:
            Over: the budget is used up, or the process was asked to end.
        """
        workspace = Workspace(self.folder, self.device, regime=self.regime.name, deadline=self.deadline)
        with self._watched(), get_engine("local")(self.processes) as executor:
            stream = Stream(
                experiments,
                self.record,
                executor,
                workspace,
                say=self._say,
                complete=self._tidy,
                fail=self._fail,
            )
            stream.run()

    def publish(self) -> None:
        """Write all results of the regime to the CSV file, if there are new ones."""
        count = self._new
        if self._published != count:
            write_csv([result for result in self.record.results if result.regime == self.regime.name], self.out)
            self._published = count

    def _say(self, result: Result) -> None:
        self._new += 1
        print(f"{time.time() - self.began:7.1f} s {self._new:>5}  {result_line(result)}", flush=True)

    def _fail(self, run: Run, error: Exception) -> None:
        self.failed.append(f"{type(error).__name__}: {error}")
        print(f"failed: {self.failed[-1]}", flush=True)
        if len(self.failed) > TOLERATED:
            raise error

    def _tidy(self, experiment: object, runs: Sequence[Run]) -> None:
        for key in {key for run in runs for key in run.task_keys}:
            file = self.folder / "tasks" / f"{key}.visadapt"
            if file.is_file() and file.stat().st_size > LARGE:
                file.unlink()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Publish at intervals, and end with what is known when the budget is used up or on ``SIGTERM``."""
        last = None if self.deadline is None else self.deadline + GRACE

        def tick(number: int, frame: FrameType | None) -> None:
            if last is not None and time.time() >= last:
                abandon("the budget")
            self.publish()
            set_timer()

        def abandon(reason: str) -> None:
            hold()
            self.publish()
            for process in multiprocessing.active_children():
                process.kill()
            raise Over(reason)

        def set_timer() -> None:
            left = EVERY if last is None else min(EVERY, max(0.01, last - time.time()))
            signal.setitimer(signal.ITIMER_REAL, left)

        def hold() -> None:
            """Be left in peace while the last results are written."""
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        before = signal.signal(signal.SIGALRM, tick), signal.signal(signal.SIGTERM, lambda *_: abandon("SIGTERM"))
        set_timer()
        try:
            yield
        finally:
            hold()
            self.publish()
            signal.signal(signal.SIGALRM, before[0])
            signal.signal(signal.SIGTERM, before[1])
