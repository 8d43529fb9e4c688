"""Compares contenders on problems, each at the learning rate that validation data chose for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Found, Training, Trial


@dataclass(frozen=True)
class Compare(Experiment):
    """Contenders × problems × seeds.

    A contender with several ``rates`` is first tried at each of them with the first seed on validation data, and then
    takes the best; test data is not looked at for that. A trial that diverges loses, and says so in its facts.

    Args:
        problems: what to compare on.
        contenders: whom.
        seeds: each a training.
        split: that the final trainings are measured on; on ``validation`` it is a sweep and no more.
        keep: names of contenders whose task files are kept, so that another split needs no training again.
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
        keep: whether task files are kept; those of the trials too, one of which is the first of the final trainings.
    """
    facts = facts or {}
    trials: list[Training] = []
    if len(contender.rates) > 1:
        rates = [contender.with_recipe(lr=rate) for rate in contender.rates]
        trials = [Trial(experiment, problem, who, seeds[0], "validation", facts, keep=keep) for who in rates]
        scores = [result.standing for trial in trials if (result := found(trial.key)) is not None]
        if len(scores) < len(trials):
            return trials
        contender = rates[scores.index(max(scores))]
    finals = [Training(experiment, problem, contender, seed, split, facts, keep=keep) for seed in seeds]
    keys = {final.key for final in finals}
    return [*(trial for trial in trials if trial.key not in keys), *finals]
