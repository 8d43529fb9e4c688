"""From domain to domain: a task trained on one initialises that of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Found, Training


@dataclass(frozen=True)
class Transfer(Experiment):
    """Every problem, from scratch and from each of the others on the same backbone: adapters and norms, a new head.

    Facts: ``source``, the problem that the adapters come from; None where they are drawn anew.

    Args:
        problems: sources and targets.
        who: the contender.
        seeds: each a training of every source and of every pair.
    """

    name: ClassVar[str] = "transfer"

    problems: tuple[Problem, ...]
    who: Contender
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, found: Found) -> list[Training]:
        runs = []
        for seed in self.seeds:
            own = {p: Training(self.name, p, self.who, seed, facts={"source": None}, keep=True) for p in self.problems}
            runs += list(own.values())
            if all(found(run.key) for run in own.values()):
                runs += [
                    Training(self.name, target, self.who, seed, facts={"source": source.name}, start=own[source])
                    for target in self.problems
                    for source in self.problems
                    if source != target and source.network == target.network and source.options == target.options
                ]
        return runs
