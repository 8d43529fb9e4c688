"""Images and text on one axis: the gap to full fine-tuning by trained parameters, and by the depth of the adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.compare import sweep_runs
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Lookup, TrainingRun
from visadapt.experiments.transplant import count_layers


@dataclass(frozen=True)
class Modality(Experiment):
    """Contenders on problems of several backbones, and one adapter in some of the layers only.

    Houlsby et al. 2019 (arXiv 1902.00751, §3.6) find that the upper layers suffice on text, Rebuffi et al. 2018 (arXiv
    1803.10082, §4.2) that shallow and deep layers need adapting on images. ``deep`` tests both in the same way: it is
    injected into the first k and into the last k layers only, for each k that is a power of 2 or half the layers. The
    norms are frozen, so that nothing else adapts.

    Facts of ``deep``: ``where``, such as ``last 4``; ``k``; ``layers``, the number of all layers. The other contenders
    have none.

    Args:
        problems: problems of any backbones.
        contenders: contenders to compare, including full fine-tuning.
        deep: the contender for some of the layers; None to leave this part out.
        seeds: one training run each.

    Examples:
        >>> from visadapt.experiments import Modality, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = Modality((digits,), (contender("bottleneck m=8"),), None, seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        3
    """

    name: ClassVar[str] = "modality"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    deep: Contender | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, lookup: Lookup) -> list[TrainingRun]:
        return [
            run
            for problem in self.problems
            for contender, facts in (*((contender, {}) for contender in self.contenders), *self._at_depths(problem))
            for run in sweep_runs(self.name, problem, contender, self.seeds, lookup, facts=facts)
        ]

    def _at_depths(self, problem: Problem) -> Iterator[tuple[Contender, dict[str, Any]]]:
        if self.deep is None:
            return
        count = count_layers(problem, self.deep)
        ks = sorted({k for k in (*(2**i for i in range(count)), count // 2) if 0 < k < count})
        ends = [
            (f"{end} {k}", k, layers)
            for k in ks
            for end, layers in (("first", range(k)), ("last", range(count - k, count)))
        ]
        for where, k, layers in (*ends, ("all", count, range(count))):
            facts = {"where": where, "k": k, "layers": count}
            name = f"{self.deep.name}, {where}"
            yield dataclasses.replace(self.deep, name=name, norms="frozen", where=layers), facts
