"""How large the first weights may be (Houlsby et al. 2019, arXiv 1902.00751, §3.6, Fig. 6 right)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visadapt.errors import VisadaptError
from visadapt.experiments.contender import Contender
from visadapt.experiments.experiment import Experiment
from visadapt.experiments.problem import Problem
from visadapt.experiments.run import Found, Training
from visadapt.experiments.train import Workplace
from visadapt.methods import Bottleneck


@dataclass(frozen=True)
class InitScale(Experiment):
    """A bottleneck whose projections are drawn with each of several standard deviations, on validation data.

    Facts: ``std``; and ``stopped``, the reason, where a training ended in numbers that are not finite. Its score is
    then that of the last good state.

    Args:
        problems: what to train on.
        who: a contender with a :class:`~visadapt.methods.Bottleneck`, at its recipe's learning rate.
        stds: to try.
        seeds: each a training.
    """

    name: ClassVar[str] = "init_scale"

    problems: tuple[Problem, ...]
    who: Contender
    stds: tuple[float, ...] = tuple(10.0**i for i in range(-7, 1))
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not isinstance(self.who.method, Bottleneck):
            raise VisadaptError(f"init_scale needs a bottleneck, got {self.who.method}")

    def runs(self, found: Found) -> list[Training]:
        return [
            Attempt(self.name, problem, self._drawn(std), seed, "validation", {"std": std})
            for problem in self.problems
            for std in self.stds
            for seed in self.seeds
        ]

    def _drawn(self, std: float) -> Contender:
        return dataclasses.replace(self.who, method=dataclasses.replace(self.who.method, init_std=std))  # type: ignore[call-arg]


@dataclass(frozen=True)
class Attempt(Training):
    """A training that may end in numbers that are not finite: that, too, is a result."""

    def trained(self, workplace: Workplace) -> tuple[nn.Module, float]:
        try:
            return super().trained(workplace)
        except VisadaptError as error:
            self.facts["stopped"] = str(error)
            return self.contender.put(self.problem, self.seed).to(workplace.device), 0.0

    def measured(self, model: nn.Module, workplace: Workplace) -> float:
        try:
            return super().measured(model, workplace)
        except VisadaptError as error:  # not even the first weights give numbers
            self.facts["stopped"] = str(error)
            return 0.0
