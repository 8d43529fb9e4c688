"""One dataclass on every backbone: the same bottleneck, at about the same fraction of networks of several families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.errors import VisadaptError
from visadapt.experiments.base import Experiment
from visadapt.experiments.compare import sweep_runs
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, TrainingRun
from visadapt.methods import Bottleneck


@dataclass(frozen=True)
class Crossmodal(Experiment):
    """``Bottleneck(m)`` and its references on one problem of each backbone.

    The width m differs between backbones, so that the trained fraction is about the same. Facts: ``weights``,
    ``pretrained`` or ``random``; ``m``, the width of a bottleneck.

    Args:
        problems: one per backbone.
        contenders: the contenders of each problem, in the same order.
        seeds: one final training run each.

    Raises:
        VisadaptError: there are not as many groups of contenders as problems.

    Examples:
        >>> from visadapt.experiments import Crossmodal, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = Crossmodal((digits,), ((contender("bottleneck m=8"), contender("lora r=4")),), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        6
    """

    name: ClassVar[str] = "crossmodal"

    problems: tuple[Problem, ...]
    contenders: tuple[tuple[Contender, ...], ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.contenders) != len(self.problems):
            raise VisadaptError(
                f"contenders must have one group per problem, got {len(self.contenders)} for {len(self.problems)}"
            )

    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        return [
            run
            for problem, group in zip(self.problems, self.contenders, strict=True)
            for contender in group
            for run in sweep_runs(
                self.name, problem, contender, self.seeds, lookup, split="both", facts=_facts(problem, contender)
            )
        ]


def _facts(problem: Problem, contender: Contender) -> dict[str, Any]:
    facts: dict[str, Any] = {"weights": "pretrained" if dict(problem.options).get("pretrained", True) else "random"}
    # a width may also be a fraction
    if isinstance(contender.method, Bottleneck) and isinstance(contender.method.m, int):
        facts["m"] = contender.method.m
    return facts
