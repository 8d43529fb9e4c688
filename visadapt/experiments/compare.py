"""Compares contenders on problems, each at the learning rate that validation data chose for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, ClassVar

from visadapt.experiments.contender import Contender
from visadapt.experiments.experiment import Experiment
from visadapt.experiments.problem import Problem
from visadapt.experiments.record import Result
from visadapt.experiments.run import Found, Training
from visadapt.table import Table


@dataclass(frozen=True)
class Compare(Experiment):
    """Contenders × problems × seeds.

    A contender with several ``rates`` is first tried at each of them with the first seed on validation data, and then
    takes the best; test data is not looked at for that.

    Args:
        problems: what to compare on.
        contenders: whom.
        seeds: each a training.
        split: that the final trainings are measured on; on ``validation`` it is a sweep and no more.
        keep: names of contenders whose task files are kept.
    """

    name: ClassVar[str] = "compare"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    keep: tuple[str, ...] = ()

    def runs(self, found: Found) -> list[Training]:
        return [
            run
            for problem in self.problems
            for contender in self.contenders
            for run in swept(
                self.name, problem, contender, self.seeds, found, split=self.split, keep=contender.name in self.keep
            )
        ]


def swept(
    experiment: str,
    problem: Problem,
    contender: Contender,
    seeds: Sequence[int],
    found: Found,
    *,
    split: str = "test",
    facts: dict[str, Any] | None = None,
    keep: bool = False,
) -> list[Training]:
    """A contender's trainings on a problem: one for each learning rate, and, once these are known, one for each seed.

    Args:
        experiment: that asks for them.
        problem: to train on.
        contender: whom; its ``rates`` are tried with the first seed on validation data.
        seeds: of the final trainings.
        found: gives results that are there.
        split: that the final trainings are measured on.
        facts: the experiment's coordinates.
        keep: whether the final trainings' task files are kept.
    """
    facts = facts or {}
    trials = []
    if len(contender.rates) > 1:
        rates = [contender.with_recipe(lr=rate) for rate in contender.rates]
        trials = [Training(experiment, problem, rated, seeds[0], "validation", facts) for rated in rates]
        scores = [result.score for trial in trials if (result := found(trial.key)) is not None]
        if len(scores) < len(trials):
            return trials
        contender = rates[scores.index(max(scores))]
    finals = [Training(experiment, problem, contender, seed, split, facts, keep=keep) for seed in seeds]
    keys = {final.key for final in finals}
    return [*(trial for trial in trials if trial.key not in keys), *finals]


def table(results: Sequence[Result], title: str = "") -> Table:
    """One row a contender: score (mean and standard deviation over seeds), parameters, seconds, file size."""
    rows = []
    for name in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == name]
        scores = [100 * result.score for result in own]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        first = own[0]
        rows.append(
            (
                name,
                f"{mean(scores):.1f}{spread}",
                f"{first.trained:,}",
                f"{100 * first.fraction:.2f} %",
                f"{first.head:,}",
                f"{mean(result.seconds for result in own):.0f}",
                f"{first.bytes / 1e6:.2f} MB",
            )
        )
    headings = ("method", "accuracy, %", "trained", "of backbone", "head", "seconds", "file")
    return Table(headings, rows, title)


def sweep_table(results: Sequence[Result], title: str = "") -> Table:
    """One row a contender: its validation score in % at each learning rate, the best starred."""
    rows = []
    for name in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == name and result.split == "validation"]
        own.sort(key=lambda result: result.lr)
        best = max(own, key=lambda result: result.score)
        cells = [f"{r.lr:g}: {100 * r.score:.1f}{' *' if r == best else ''}" for r in own]
        rows.append((name, best.epochs, "   ".join(cells), f"{best.lr:g}"))
    return Table(("method", "epochs", "validation score in % by learning rate", "picked"), rows, title)
