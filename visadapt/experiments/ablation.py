"""Which layers' adapters matter (Houlsby et al. 2019, arXiv 1902.00751, §3.6, Fig. 6 left and middle)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result, key_of
from visadapt.experiments.run import Found, Run, Training
from visadapt.experiments.train import Workplace, costs, measure
from visadapt.experiments.transplant import layers, without


@dataclass(frozen=True)
class Ablation(Experiment):
    """The adapters of every span of layers i…j taken out of a trained task, without training again, on validation data.

    Facts: ``first`` and ``last`` layer of the span, None where nothing is taken out; ``norms``: ``kept``, or
    ``reverted`` where the task's norms in the span are taken out with the adapters; ``layers``: how many there are;
    ``majority``: the score of naming the most frequent class always.

    Args:
        problems: what to train on.
        contenders: whom.
        seeds: each a training.
        norms: what becomes of the norms.
    """

    name: ClassVar[str] = "ablation"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0,)
    norms: tuple[str, ...] = ("kept", "reverted")

    def runs(self, found: Found) -> list[Run]:
        return [
            # all that is taken out of a task is one run: the task is trained once, whoever works beside
            Removal(Training(self.name, problem, contender, seed, "validation", keep=True), self.norms)
            for problem in self.problems
            for contender in self.contenders
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Removal(Run):
    """All spans of one trained task, with the norms kept or reverted.

    Args:
        training: of the task.
        norms: ``kept``, ``reverted`` or both.
    """

    training: Training
    norms: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._cases())

    @property
    def layers(self) -> int:
        """How many there are to take something out of."""
        return layers(self.training.problem, self.training.contender)

    def _cases(self) -> dict[str, tuple[str, tuple[int, int] | None]]:
        """Key → what becomes of the norms, and the span that is taken out."""
        who = self.training
        spans = [None, *((i, j) for i in range(self.layers) for j in range(i, self.layers))]
        return {
            key_of(task=who.task_key, split=who.split, removed=span, norms=norms): (norms, span)
            for norms in self.norms
            for span in spans
        }

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        who = self.training
        problem, task = who.problem, who.problem.name
        model, seconds = who.trained(workplace)
        paid = costs(model, task, seconds)
        labels = problem.splits.validation.labels
        assert labels is not None
        # one class for all is a correlation of zero
        majority = 0.0 if problem.metric == "matthews" else labels.bincount().max().item() / len(labels)
        for key, (norms, span) in self._cases().items():
            if key not in missing:
                continue
            first, last = span or (None, None)
            at = range(0) if span is None else range(span[0], span[1] + 1)
            with without(model, task, at, norms=norms == "reverted"):
                score = measure(model, task, problem, who.split, workplace)
            result = who.result(key, score, seconds, workplace, paid)
            facts = {"first": first, "last": last, "norms": norms, "layers": self.layers, "majority": majority}
            yield dataclasses.replace(result, facts=facts)
