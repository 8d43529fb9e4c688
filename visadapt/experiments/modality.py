"""Images and text on one axis: what adapters lose against fine-tuning by what they train, and at which depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.compare import swept
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Found, Training
from visadapt.experiments.transplant import layers


@dataclass(frozen=True)
class Modality(Experiment):
    """Contenders, full fine-tuning among them, on problems of several backbones; and one of them at parts of the depth.

    Houlsby et al. 2019 (arXiv 1902.00751, §3.6) find that the upper layers suffice on text, Rebuffi et al. 2018 (arXiv
    1803.10082, §4.2) that shallow and deep ones need adapting on images. ``deep`` answers on one footing: it is put
    into the first k and into the last k layers only, k each power of 2 and half of them, with the norms frozen, so that
    nothing else adapts.

    Facts: none of the contenders; of ``deep`` its place ``where``, such as ``last 4``, ``k`` and the number of all
    ``layers``.

    Args:
        problems: of any backbones.
        contenders: whom.
        deep: the contender at parts of the depth; None leaves that out.
        seeds: each a training.
    """

    name: ClassVar[str] = "modality"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    deep: Contender | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, found: Found) -> list[Training]:
        return [
            run
            for problem in self.problems
            for who, facts in (*((who, {}) for who in self.contenders), *self._places(problem))
            for run in swept(self.name, problem, who, self.seeds, found, facts=facts)
        ]

    def _places(self, problem: Problem) -> Iterator[tuple[Contender, dict[str, Any]]]:
        if self.deep is None:
            return
        count = layers(problem, self.deep)
        ks = sorted({k for k in (*(2**i for i in range(count)), count // 2) if 0 < k < count})
        ends = [
            (f"{end} {k}", k, at) for k in ks for end, at in (("first", range(k)), ("last", range(count - k, count)))
        ]
        for where, k, at in (*ends, ("all", count, range(count))):
            facts = {"where": where, "k": k, "layers": count}
            name = f"{self.deep.name}, {where}"
            yield dataclasses.replace(self.deep, name=name, norms="frozen", where=at), facts
