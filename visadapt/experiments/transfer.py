"""Transfer between domains: a task trained on one domain initialises the task of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, TrainingRun


@dataclass(frozen=True)
class Transfer(Experiment):
    """Train every problem from scratch, and from the adapters and norms of each other one, with a new head.

    Only problems with the same backbone are paired. Facts: ``source``, the problem that the adapters come from; None
    for training from scratch.

    Args:
        problems: sources and targets.
        who: the contender.
        seeds: one training run per problem and per pair each.

    Examples:
        >>> from visadapt.experiments import Transfer, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> mnist = problem("timm/resnet18", "mnist")
        >>> experiment = Transfer((digits, mnist), contender("bottleneck m=8"), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        2
    """

    name: ClassVar[str] = "transfer"

    problems: tuple[Problem, ...]
    who: Contender
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        runs = []
        for seed in self.seeds:
            scratch = {
                problem: TrainingRun(self.name, problem, self.who, seed, facts={"source": None}, keep=True)
                for problem in self.problems
            }
            runs += list(scratch.values())
            if all(lookup(run.key) for run in scratch.values()):
                runs += [
                    TrainingRun(self.name, target, self.who, seed, facts={"source": source.name}, start=scratch[source])
                    for target in self.problems
                    for source in self.problems
                    if source != target and source.network == target.network and source.options == target.options
                ]
        return runs
