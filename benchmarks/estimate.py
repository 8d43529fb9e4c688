"""What a regime's stages take: a simulation of the stream of training runs, with the measured seconds per step.

python -m benchmarks.estimate --regime cuda --processes 14 [--only bars] [--glue FOLDER …]

A training run takes its steps times the larger of the time that a process needs to launch a step and, as all processes
share one device, the device's time per step times the number of processes; and its seconds of set-up and measuring.
The choices are simulated too: the best learning rate is the last of the grid, so that one more is tried, and more
epochs help. Printed are the times at which the comparisons of so many contenders with so many seeds are complete.
"""

from __future__ import annotations

import argparse
import heapq
import math
import tempfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence import STAGES, add_data, data_of
from benchmarks.regimes import REGIMES, Regime
from visadapt.experiments import Compare, Experiment, Result
from visadapt.experiments.ablation import Removal
from visadapt.experiments.contenders import Contender
from visadapt.experiments.executors import Ended, Executor
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Record
from visadapt.experiments.run import Run, TrainingRun
from visadapt.experiments.sequence import Chain
from visadapt.experiments.stream import Stream
from visadapt.experiments.train import Workspace
from visadapt.methods import Linear


@dataclass(frozen=True)
class Speed:
    """Seconds on one kind of device.

    Attributes:
        launch: seconds of a process per training step, whatever the device does meanwhile.
        text: seconds of the device per training text of 32 tokens.
        image: seconds of the device per training image of 64 px.
        head: seconds per step of a linear probe on its cached features.
        run: seconds per run for everything but the steps.
        process: seconds until a process is ready.
    """

    launch: float
    text: float
    image: float
    head: float
    run: float
    process: float

    def seconds(self, problem: Problem, contender: Contender, processes: int) -> float:
        """Estimate the duration of one training run beside those of other processes."""
        recipe = contender.recipe
        count = problem.train or 8551  # CoLA
        steps = recipe.epochs * math.ceil(count / recipe.batch_size)
        if isinstance(contender.method, Linear):
            return self.run + steps * self.head
        device = recipe.batch_size * (self.text if problem.modality == "text" else self.image)
        return self.run + steps * max(self.launch, processes * device)


SPEEDS = {
    # of two processes with a thread each, beside other work: half of the mean over contenders and runs in
    # results/evidence-cpu.csv
    "cpu": Speed(0.0, 0.0155, 0.0205, 0.002, 8.0, 10.0),
    # of one process beside others that share an H100
    "cuda": Speed(0.020, 1e-3 / 32, 2e-3 / 32, 0.004, 2.5, 20.0),
}


class Simulated(Executor):
    """Pretends to execute runs, and keeps the time that they would take.

    Attributes:
        now: seconds since the start.
        trained: number of training runs begun so far.
        reached: the time and the number of training runs at which comparisons were complete, by what they compare.
    """

    def __init__(self, speed: Speed, processes: int, regime: str) -> None:
        self.places, self.speed, self.regime = processes, speed, regime
        self.now, self.trained = speed.process, 0
        self.reached: dict[str, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Run, Collection[str]]] = []

    def begin(self, run: Run, missing: Collection[str], workspace: Workspace) -> None:
        pairs = _trained(run)
        seconds = sum(self.speed.seconds(*pair, self.places) for pair in pairs)
        self.trained += len(pairs)
        heapq.heappush(self._heap, (self.now + seconds, self.trained, run, missing))

    def collect(self) -> Iterator[Result | Ended]:
        self.now, _, run, missing = heapq.heappop(self._heap)
        for key in missing:
            yield _result(run, key, self.regime)
        yield Ended(run)

    def complete(self, experiment: object, runs: object) -> None:
        """Note that an experiment is complete."""
        name = "all"
        if isinstance(experiment, Compare):
            name = f"{len(experiment.contenders)} contenders, {len(experiment.seeds)} seeds"
        self.reached[name] = self.now, self.trained


def _trained(run: Run) -> list[tuple[Problem, Contender]]:
    if isinstance(run, Removal):
        run = run.training
    if isinstance(run, Chain):
        return [(problem, run.contender) for problem in run.problems]
    return [(run.problem, run.contender)] if isinstance(run, TrainingRun) else []


def _result(run: Run, key: str, regime: str) -> Result:
    if isinstance(run, Removal):
        run = run.training
    name = run.experiment if isinstance(run, TrainingRun) else "sequence"
    score = 0.5
    if isinstance(run, TrainingRun):
        contender = run.contender
        best = contender.rates[-1] if contender.rates else contender.recipe.lr
        noise = zlib.crc32(key.encode()) / 2**32 / 100
        score = 0.5 + noise + contender.recipe.epochs / 100 - abs(math.log(contender.recipe.lr / best)) / 20
    return Result(key, name, "image", "", "", "", 0, "test", "accuracy", score, 1, 1, 1, 1.0, 1, 1.0, 1, regime=regime)


def simulate(experiments: Iterator[Experiment], regime: Regime, processes: int) -> Simulated:
    """Simulate a stream of experiments in a regime, whose name is that of the device."""
    executor = Simulated(SPEEDS[regime.name], processes, regime.name)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), regime=regime.name)
        Stream(
            experiments, Record(folder), executor, workspace, say=lambda result: None, complete=executor.complete
        ).run()
    return executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=SPEEDS, default="cuda")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", help="comma-separated list of stages; default: all")
    add_data(parser)
    args = parser.parse_args()
    regime, data = REGIMES[args.regime], data_of(args)
    print(f"{args.regime}, {args.processes} processes, {SPEEDS[args.regime]}")
    for stage in STAGES:
        if args.only is None or stage.__name__ in args.only.split(","):
            done = simulate(stage(data, regime), regime, args.processes)
            for name, (seconds, count) in done.reached.items():
                print(f"{stage.__name__}, {name}: {count} training runs, {seconds:,.0f} s = {seconds / 3600:.1f} h")


if __name__ == "__main__":
    main()
