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
from visadapt.experiments.run import Lookup, Run, TrainingRun
from visadapt.experiments.train import Workspace, costs, measure
from visadapt.experiments.transplant import count_layers, without_layers


@dataclass(frozen=True)
class Ablation(Experiment):
    """Remove the adapters of every span of layers i…j from a trained task and measure it on validation data.

    The task is not trained again after the removal.

    Facts: ``first`` and ``last`` layer of the span, None where nothing is removed; ``norms``: ``kept``, or
    ``reverted`` where the task's norms in the span are removed with the adapters; ``layers``: the number of layers;
    ``majority``: the score of always predicting the most frequent class.

    Args:
        problems: problems to train on.
        contenders: contenders to train.
        seeds: one training run each.
        norms: ``kept``, ``reverted`` or both.

    Examples:
        >>> from visadapt.experiments import Ablation, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> experiment = Ablation((digits,), (contender("bottleneck m=8"),), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        1
    """

    name: ClassVar[str] = "ablation"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0,)
    norms: tuple[str, ...] = ("kept", "reverted")

    def runs(self, lookup: Lookup) -> list[Run]:
        return [
            # one run for all spans of a task: parallel processes would otherwise train the same task twice
            Removal(TrainingRun(self.name, problem, contender, seed, "validation", keep=True), self.norms)
            for problem in self.problems
            for contender in self.contenders
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Removal(Run):
    """All spans of one trained task, with the norms kept or reverted.

    Args:
        training: the run that trains the task.
        norms: ``kept``, ``reverted`` or both.
    """

    training: TrainingRun
    norms: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._cases())

    @property
    def task_keys(self) -> tuple[str, ...]:
        return self.training.task_keys

    @property
    def layer_count(self) -> int:
        """Number of layers with adapters."""
        return count_layers(self.training.problem, self.training.contender)

    def _cases(self) -> dict[str, tuple[str, tuple[int, int] | None]]:
        """Key → treatment of the norms, and the span to remove."""
        count = self.layer_count
        spans = [None, *((i, j) for i in range(count) for j in range(i, count))]
        return {
            key_of(task=self.training.task_key, split=self.training.split, removed=span, norms=norms): (norms, span)
            for norms in self.norms
            for span in spans
        }

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        training, problem, task = self.training, self.training.problem, self.training.problem.name
        model, seconds = training.trained(workspace)
        task_costs = costs(model, task, seconds)
        labels = problem.splits.validation.labels
        # predicting one class for every sample has a Matthews correlation of zero
        majority = 0.0 if problem.metric == "matthews" else labels.bincount().max().item() / len(labels)
        for key, (norms, span) in self._cases().items():
            if key not in missing:
                continue
            first, last = span or (None, None)
            removed = range(0) if span is None else range(span[0], span[1] + 1)
            with without_layers(model, task, removed, norms=norms == "reverted"):
                score = measure(model, task, problem, training.split, workspace)
            result = training.result(key, score, seconds, workspace, task_costs)
            facts = {"first": first, "last": last, "norms": norms, "layers": self.layer_count, "majority": majority}
            yield dataclasses.replace(result, facts=facts)
