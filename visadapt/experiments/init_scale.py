"""How large the initial weights may be (Houlsby et al. 2019, arXiv 1902.00751, §3.6, Fig. 6 right)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from visadapt.errors import VisadaptError
from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, Trial
from visadapt.methods import Bottleneck


@dataclass(frozen=True)
class InitScale(Experiment):
    """A bottleneck initialised with each of several standard deviations, measured on validation data.

    Facts: ``std``; and ``stopped``, the reason, where a training run ended in numbers that are not finite. Its score is
    then the score of the untrained task.

    Args:
        problems: problems to train on.
        who: a contender with a `visadapt.methods.Bottleneck`, trained at its recipe's learning rate.
        stds: standard deviations of the projections' initial weights.
        seeds: one training run each.

    Raises:
        VisadaptError: the contender's method is not a bottleneck.

    Examples:
        >>> from visadapt.experiments import InitScale, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = InitScale((digits,), contender("bottleneck m=8"), stds=(1e-3, 1e-2), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        2
    """

    name: ClassVar[str] = "init_scale"

    problems: tuple[Problem, ...]
    who: Contender
    stds: tuple[float, ...] = tuple(10.0**i for i in range(-7, 1))
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.who.method, Bottleneck):
            raise VisadaptError(f"the method of init_scale's contender must be a Bottleneck, got {self.who.method}")

    def runs(self, lookup: Lookup) -> list[Trial]:
        return [
            Trial(self.name, problem, self._initialised(std), seed, "validation", {"std": std})
            for problem in self.problems
            for std in self.stds
            for seed in self.seeds
        ]

    def _initialised(self, std: float) -> Contender:
        return dataclasses.replace(self.who, method=dataclasses.replace(self.who.method, init_std=std))  # type: ignore[call-arg]
