"""Trained parameters against score (Houlsby et al. 2019, arXiv 1902.00751, Fig. 3–5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.catalogue import FULL, contender
from visadapt.experiments.compare import sweep_runs
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, TrainingRun


@dataclass(frozen=True)
class Tradeoff(Experiment):
    """Bottlenecks of several widths against fine-tuning the top layers, all layers, and the norms alone.

    Facts: ``m`` of a bottleneck, ``n`` of top layers; none of the other two.

    Args:
        problems: problems to compare on.
        widths: widths m of the bottlenecks.
        layers: numbers n of top layers.
        seeds: one training run each.
        epochs: epochs of every training run.
        settled: prefixes of the names of contenders that use the catalogue's learning rate; the others' rates are
            chosen on validation data.
        head_first: whether a new head starts as the linear probe.

    Examples:
        >>> from visadapt.experiments import Tradeoff, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = Tradeoff((digits,), widths=(8, 16), layers=(1,), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        15
    """

    name: ClassVar[str] = "tradeoff"

    problems: tuple[Problem, ...]
    widths: tuple[int, ...] = tuple(2**i for i in range(10))
    layers: tuple[int, ...] = (1, 2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    settled: tuple[str, ...] = ()
    head_first: bool = True

    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        return [
            run
            for problem in self.problems
            for rated, facts in self._contenders()
            for run in sweep_runs(self.name, problem, rated, self.seeds, lookup, facts=facts)
        ]

    def _contenders(self) -> Iterator[tuple[Contender, dict[str, Any]]]:
        facts_by_name: dict[str, dict[str, Any]] = {f"bottleneck m={m}": {"m": m} for m in self.widths}
        facts_by_name |= {f"top layers n={n}": {"n": n} for n in self.layers}
        facts_by_name |= {"norms only": {}, FULL: {}}
        for name, facts in facts_by_name.items():
            rated = contender(name, self.epochs, self.head_first)
            yield (dataclasses.replace(rated, rates=()) if name.startswith(self.settled) else rated), facts
