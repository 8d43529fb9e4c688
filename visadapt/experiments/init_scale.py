"""How large the first weights may be (Houlsby et al. 2019, arXiv 1902.00751, §3.6, Fig. 6 right)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from visadapt.errors import VisadaptError
from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Found, Trial
from visadapt.methods import Bottleneck


@dataclass(frozen=True)
class InitScale(Experiment):
    """A bottleneck whose projections are drawn with each of several standard deviations, on validation data.

    Facts: ``std``; and ``stopped``, the reason, where a training ended in numbers that are not finite. Its score is
    then that of the untrained task.

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

    def runs(self, found: Found) -> list[Trial]:
        return [
            Trial(self.name, problem, self._drawn(std), seed, "validation", {"std": std})
            for problem in self.problems
            for std in self.stds
            for seed in self.seeds
        ]

    def _drawn(self, std: float) -> Contender:
        return dataclasses.replace(self.who, method=dataclasses.replace(self.who.method, init_std=std))  # type: ignore[call-arg]
