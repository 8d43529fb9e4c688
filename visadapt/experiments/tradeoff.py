"""Size against score (Houlsby et al. 2019, arXiv 1902.00751, Fig. 3–5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.catalogue import contender
from visadapt.experiments.compare import swept
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.run import Found, Training


@dataclass(frozen=True)
class Tradeoff(Experiment):
    """Bottlenecks of widths ``m`` against fine-tuning the top ``n`` layers, all of them, and the norms alone.

    Facts: ``m`` of a bottleneck, ``n`` of top layers; nothing of the other two.

    Args:
        problems: what to compare on.
        widths: m.
        layers: n.
        seeds: each a training.
        epochs: of every training.
        settled: how the names of those contenders begin whose learning rate is the catalogue's; that of the others is
            chosen on validation data.
    """

    name: ClassVar[str] = "tradeoff"

    problems: tuple[Problem, ...]
    widths: tuple[int, ...] = tuple(2**i for i in range(10))
    layers: tuple[int, ...] = (1, 2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    settled: tuple[str, ...] = ()

    def runs(self, found: Found) -> list[Training]:
        return [
            run
            for problem in self.problems
            for who, facts in self._contenders()
            for run in swept(self.name, problem, who, self.seeds, found, facts=facts)
        ]

    def _contenders(self) -> Iterator[tuple[Contender, dict[str, Any]]]:
        told = [(f"bottleneck m={m}", {"m": m}) for m in self.widths]
        told += [(f"top layers n={n}", {"n": n}) for n in self.layers]
        told += [("norms only", {}), ("full fine-tuning", {})]
        for name, facts in told:
            who = contender(name, self.epochs)
            yield (dataclasses.replace(who, rates=()) if name.startswith(self.settled) else who), facts
