"""Comparison of contenders on problems, each at the learning rate that is best on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.experiments.base import Experiment
from visadapt.experiments.choice import choose
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result
from visadapt.experiments.run import BothSplits, Lookup, TrainingRun, Trial


@dataclass(frozen=True)
class Compare(Experiment):
    """Contenders × problems × seeds.

    A contender with several ``rates`` or ``lengths`` is first trained at several of them with the first seed, measured
    on validation data, and then uses the best (see `visadapt.experiments.choice.choose`); test data is not used for
    this choice. A trial that diverges is never chosen, and its result has the fact ``stopped``.

    Args:
        problems: problems to compare on.
        contenders: contenders to compare.
        seeds: one training run each.
        split: split that the final runs are measured on: ``test``, ``validation``, with which the experiment is a
            sweep, or ``both``.
        keep: names of contenders whose task files are kept, so that another split can be measured without training
            again.

    Examples:
        >>> from visadapt.experiments import Compare, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = Compare((digits,), (contender("bottleneck m=8"), contender("lora r=4")), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        6
    """

    name: ClassVar[str] = "compare"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contenders:
            raise VisadaptError("contenders must have at least one entry")
        check_choice(self.split, ("test", "validation", "both"), "split")

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
    """Return a contender's training runs on a problem: those to choose by, then, given their results, one per seed.

    Args:
        experiment: name of the experiment.
        problem: problem to train on.
        contender: contender to train; its ``rates`` and ``lengths`` are tried with the first seed on validation data.
        seeds: seeds of the final runs.
        lookup: returns the result of a key, or None.
        split: split that the final runs are measured on: ``test``, ``validation`` or ``both``.
        facts: the experiment's coordinates.
        keep: keep the task files, including those of the trials: the best trial is also the final run of that seed.
    """
    facts = facts or {}
    tried: dict[str, TrainingRun] = {}

    def facts_of(candidate: Contender) -> dict[str, Any]:
        return facts if candidate.method == contender.method else {**facts, "variant": str(candidate.method)}

    def result_of(candidate: Contender) -> Result | None:
        trial = Trial(experiment, problem, candidate, seeds[0], "validation", facts_of(candidate), keep=keep)
        key = trial.key
        tried[key] = trial
        return lookup(key)

    _, chosen = choose(contender, result_of)
    trials = list(tried.values())
    if chosen is None:
        return trials
    kind = BothSplits if split == "both" else TrainingRun
    measured = "test" if split == "both" else split
    finals = [kind(experiment, problem, chosen, seed, measured, facts_of(chosen), keep=keep) for seed in seeds]
    keys = {key for final in finals for key in final.keys}
    return [*(trial for trial in trials if trial.key not in keys), *finals]
