"""Which layers' adapters matter (Houlsby et al. 2019, arXiv 1902.00751, §3.6, Fig. 6 left and middle)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from visadapt.experiments.contender import Contender
from visadapt.experiments.experiment import Experiment
from visadapt.experiments.parts import layers, without
from visadapt.experiments.problem import Problem
from visadapt.experiments.record import Result, key_of
from visadapt.experiments.run import Found, Run, Training
from visadapt.experiments.train import Workplace, costs, measure


@dataclass(frozen=True)
class Ablation(Experiment):
    """The adapters of every span of layers i…j taken out of a trained task, without training again, on validation data.

    Facts: ``first`` and ``last`` layer of the span, None where nothing is taken out; ``norms``: ``kept``, or
    ``reverted`` where the task's norms in the span are taken out with the adapters; ``majority``: the score of naming
    the most frequent class always.

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
            Removal(Training(self.name, problem, contender, seed, "validation", keep=True), norms)
            for problem in self.problems
            for contender in self.contenders
            for seed in self.seeds
            for norms in self.norms
        ]


@dataclass(frozen=True)
class Removal(Run):
    """All spans of one trained task.

    Args:
        training: of the task.
        norms: ``kept`` or ``reverted``.
    """

    training: Training
    norms: str

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._spans())

    def _spans(self) -> dict[str, tuple[int, int] | None]:
        who = self.training
        count = layers(who.problem, who.contender)
        spans = [None, *((i, j) for i in range(count) for j in range(i, count))]
        return {key_of(task=who.task_key, split=who.split, removed=span, norms=self.norms): span for span in spans}

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        who = self.training
        problem, task = who.problem, who.problem.name
        model, seconds = who.trained(workplace)
        paid = costs(model, task, seconds)
        labels = problem.splits.validation.labels
        assert labels is not None
        # one class for all is a correlation of zero
        majority = 0.0 if problem.metric == "matthews" else labels.bincount().max().item() / len(labels)
        for key, span in self._spans().items():
            if key not in missing:
                continue
            first, last = span or (None, None)
            at = range(0) if span is None else range(span[0], span[1] + 1)
            with without(model, task, at, norms=self.norms == "reverted"):
                score = measure(model, task, problem, who.split, workplace)
            result = who.result(key, score, seconds, workplace, paid)
            facts = {"first": first, "last": last, "norms": self.norms, "majority": majority}
            yield dataclasses.replace(result, facts=facts)
