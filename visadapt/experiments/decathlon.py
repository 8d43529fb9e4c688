"""The score of the Visual Decathlon: one number for how a method does on many tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.base import Experiment
from visadapt.experiments.compare import swept
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result, key_of
from visadapt.experiments.run import Found, Run
from visadapt.experiments.train import Workplace

FINE_TUNED = {
    "imagenet": 59.87,
    "aircraft": 60.34,
    "cifar100": 82.12,
    "dped": 92.82,
    "dtd": 55.53,
    "gtsrb": 97.53,
    "flowers": 81.41,
    "omniglot": 87.69,
    "svhn": 96.55,
    "ucf101": 51.20,
}
"""The challenge's tasks and the accuracy in % of a fine-tuned network, to which a score is relative."""

Accuracies = Mapping[str, float] | Sequence[float]


def score(accuracies: Accuracies, baselines: Accuracies = FINE_TUNED) -> float:
    """S = Σ_d α_d · max(0, Emax_d − E_d)², with Emax_d twice the baseline's error and α_d = 1000 / Emax_d².

    Ten tasks without an error score 10 000, the baseline itself 2 500 (Rebuffi et al. 2017, arXiv 1705.08045, §4).

    Args:
        accuracies: in %, by task or in the order of ``baselines``.
        baselines: likewise, of what to compare with; none of them 100.

    Raises:
        VisadaptError: the tasks are not the same, or something is no percentage.
    """
    found, base = _named(accuracies, baselines), _named(baselines, baselines)
    total = 0.0
    for task, baseline in base.items():
        if task not in found:
            raise VisadaptError(f"no accuracy for task {task!r}{nearest(task, found)}")
        if not 0 <= found[task] <= 100 or not 0 <= baseline < 100:
            raise VisadaptError(
                f"accuracies are in %, the baselines' below 100; {task!r} has {found[task]}, {baseline}"
            )
        most = 2 * (100 - baseline)
        total += 1000 * max(0.0, 1 - (100 - found[task]) / most) ** 2
    extra = [task for task in found if task not in base]
    if extra:
        raise VisadaptError(f"no baseline for task {extra[0]!r}{nearest(extra[0], base)}")
    return total


def _named(accuracies: Accuracies, order: Accuracies) -> dict[str, float]:
    if isinstance(accuracies, Mapping):
        return dict(accuracies)
    names = list(order) if isinstance(order, Mapping) else [str(i) for i in range(len(order))]
    if len(accuracies) != len(names):
        raise VisadaptError(f"{len(accuracies)} accuracies for {len(names)} tasks")
    return dict(zip(names, accuracies, strict=True))


@dataclass(frozen=True)
class Decathlon(Experiment):
    """Contenders on all problems, and for each seed the score that sums them up.

    A score is relative to the mean error of ``baseline`` over all seeds. Its result has the problem ``all``, the metric
    ``decathlon`` and the sums of what the problems' tasks cost; facts: ``problems``, their names; ``seeds``, how many
    the baseline's error is the mean of; and ``total``, the parameters of all tasks and the backbone as a multiple of
    the backbone.

    Args:
        problems: the domains, all on one backbone.
        contenders: whom to score.
        baseline: full fine-tuning.
        seeds: each a training of every problem.
    """

    name: ClassVar[str] = "decathlon"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    baseline: Contender
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, found: Found) -> list[Run]:
        runs: list[Run] = []
        made: dict[tuple[str, str], list[Result]] = {}
        everyone = (self.baseline, *(who for who in self.contenders if who != self.baseline))
        for problem in self.problems:
            for who in everyone:
                own = swept(self.name, problem, who, self.seeds, found)
                runs += own
                results = [found(run.key) for run in own if run.split == "test"]
                made[problem.name, who.name] = [result for result in results if result is not None]
        if any(len(results) < len(self.seeds) for results in made.values()):
            return runs
        names = [problem.name for problem in self.problems]
        baselines = {name: 100 * mean(r.score for r in made[name, self.baseline.name]) for name in names}
        for who in everyone:
            for number in range(len(self.seeds)):
                parts = tuple(made[name, who.name][number] for name in names)
                runs.append(Sum(parts, baselines, len(self.seeds)))
        return runs


@dataclass(frozen=True)
class Sum(Run):
    """A contender's score over all problems.

    Args:
        parts: its result on each.
        baselines: accuracies in % to compare with, by problem.
        seeds: how many these are the means of.
    """

    parts: tuple[Result, ...]
    baselines: dict[str, float]
    seeds: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (key_of(parts=[part.key for part in self.parts], baselines=self.baselines),)

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        own = {part.problem: 100 * part.score for part in self.parts}
        first = self.parts[0]
        total = 1 + sum(part.trained + part.head for part in self.parts) / first.backbone
        yield dataclasses.replace(
            first,
            key=self.keys[0],
            problem="all",
            metric="decathlon",
            score=score(own, self.baselines),
            trained=sum(part.trained for part in self.parts),
            head=sum(part.head for part in self.parts),
            seconds=sum(part.seconds for part in self.parts),
            bytes=sum(part.bytes for part in self.parts),
            facts={"problems": list(own), "seeds": self.seeds, "total": total},
            setting=None,
        )
