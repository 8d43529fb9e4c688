"""Comparison of contenders on problems, each at the learning rate that is best on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, TrainingRun, Trial


@dataclass(frozen=True)
class Compare(Experiment):
    """Contenders × problems × seeds.

    A contender with several ``rates`` is first trained at each of them with the first seed, measured on validation
    data, and then uses the best one; test data is not used for this choice. A trial that diverges is never chosen, and
    its result has the fact ``stopped``.

    Args:
        problems: problems to compare on.
        contenders: contenders to compare.
        seeds: one training run each.
        split: split that the final runs are measured on; with ``validation`` the experiment is a sweep.
        keep: names of contenders whose task files are kept, so that another split can be measured without training
            again.
    """

    name: ClassVar[str] = "compare"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    keep: tuple[str, ...] = ()

    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        return [
            run
            for problem in self.problems
            for contender in self.contenders
            for run in sweep_runs(
                self.name, problem, contender, self.seeds, lookup, split=self.split, keep=contender.name in self.keep
            )
        ]


def sweep_runs(
    experiment: str,
    problem: Problem,
    contender: Contender,
    seeds: Sequence[int],
    lookup: Lookup,
    *,
    split: str = "test",
    facts: dict[str, Any] | None = None,
    keep: bool = False,
) -> list[TrainingRun]:
    """Return a contender's training runs on a problem: one per learning rate, then, given their results, one per seed.

    Args:
        experiment: name of the experiment.
        problem: problem to train on.
        contender: contender to train; its ``rates`` are tried with the first seed on validation data.
        seeds: seeds of the final runs.
        lookup: returns the result of a key, or None.
        split: split that the final runs are measured on.
        facts: the experiment's coordinates.
        keep: keep the task files, including those of the trials: the best trial is also the final run of that seed.
    """
    facts = facts or {}
    trials: list[TrainingRun] = []
    if len(contender.rates) > 1:
        rates = [contender.with_recipe(lr=rate) for rate in contender.rates]
        trials = [Trial(experiment, problem, rated, seeds[0], "validation", facts, keep=keep) for rated in rates]
        scores = [result.standing for trial in trials if (result := lookup(trial.key)) is not None]
        if len(scores) < len(trials):
            return trials
        contender = rates[scores.index(max(scores))]
    finals = [TrainingRun(experiment, problem, contender, seed, split, facts, keep=keep) for seed in seeds]
    keys = {final.key for final in finals}
    return [*(trial for trial in trials if trial.key not in keys), *finals]
