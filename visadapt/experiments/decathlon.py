"""The Visual Decathlon score: one number for a method's accuracy on many tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.base import Experiment
from visadapt.experiments.compare import sweep_runs
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result, key_of
from visadapt.experiments.run import Lookup, Run
from visadapt.experiments.train import Workspace

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
"""The challenge's tasks, and the accuracy in % of the fine-tuned networks that scores are relative to."""

Accuracies = Mapping[str, float] | Sequence[float]


def score(accuracies: Accuracies, baselines: Accuracies = FINE_TUNED) -> float:
    """Compute S = Σ_d α_d · max(0, Emax_d − E_d)², with Emax_d twice the baseline's error and α_d = 1000 / Emax_d².

    Ten tasks without errors score 10 000, the baseline itself 2 500 (Rebuffi et al. 2017, arXiv 1705.08045, §4).

    Args:
        accuracies: accuracies in %, by task or in the order of ``baselines``.
        baselines: the baseline's accuracies in %, all below 100.

    Returns:
        The score.

    Raises:
        VisadaptError: the tasks differ, or a value is not a percentage in range.
    """
    achieved, base = _by_task(accuracies, baselines), _by_task(baselines, baselines)
    total = 0.0
    for task, baseline in base.items():
        if task not in achieved:
            raise VisadaptError(f"no accuracy for task {task!r}{nearest(task, achieved)}")
        if not 0 <= achieved[task] <= 100:
            raise VisadaptError(f"the accuracy of task {task!r} must be in [0, 100] %, got {achieved[task]}")
        if not 0 <= baseline < 100:
            raise VisadaptError(f"the baseline of task {task!r} must be in [0, 100) %, got {baseline}")
        max_error = 2 * (100 - baseline)
        total += 1000 * max(0.0, 1 - (100 - achieved[task]) / max_error) ** 2
    extra = [task for task in achieved if task not in base]
    if extra:
        raise VisadaptError(f"no baseline for task {extra[0]!r}{nearest(extra[0], base)}")
    return total


def _by_task(accuracies: Accuracies, order: Accuracies) -> dict[str, float]:
    if isinstance(accuracies, Mapping):
        return dict(accuracies)
    names = list(order) if isinstance(order, Mapping) else [str(i) for i in range(len(order))]
    if len(accuracies) != len(names):
        raise VisadaptError(f"there must be one accuracy per task, got {len(accuracies)} for {len(names)} tasks")
    return dict(zip(names, accuracies, strict=True))


@dataclass(frozen=True)
class Decathlon(Experiment):
    """Contenders on all problems, and one decathlon score per contender and seed.

    Scores are relative to the mean error of ``baseline`` over all seeds. The result of a score has the problem ``all``,
    the metric ``decathlon`` and the summed costs of its tasks. Facts: ``problems``, their names; ``seeds``, the number
    of seeds that the baseline's error is averaged over; ``total``, the parameters of the backbone and all tasks as a
    multiple of the backbone's.

    Args:
        problems: the domains, all on one backbone.
        contenders: contenders to score.
        baseline: full fine-tuning.
        seeds: one training run per problem each.

    Examples:
        >>> from visadapt.experiments import Decathlon, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> mnist = problem("timm/resnet18", "mnist")
        >>> experiment = Decathlon((digits, mnist), (contender("bottleneck m=8"),), contender("full"), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        12
    """

    name: ClassVar[str] = "decathlon"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    baseline: Contender
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, lookup: Lookup) -> list[Run]:
        runs: list[Run] = []
        tests: dict[tuple[str, str], list[Result]] = {}
        contenders = (self.baseline, *(contender for contender in self.contenders if contender != self.baseline))
        for problem in self.problems:
            for contender in contenders:
                sweep = sweep_runs(self.name, problem, contender, self.seeds, lookup)
                runs += sweep
                results = [lookup(run.key) for run in sweep if run.split == "test"]
                tests[problem.name, contender.name] = [result for result in results if result is not None]
        if any(len(results) < len(self.seeds) for results in tests.values()):
            return runs
        names = [problem.name for problem in self.problems]
        baselines = {name: 100 * mean(r.score for r in tests[name, self.baseline.name]) for name in names}
        for contender in contenders:
            for number in range(len(self.seeds)):
                parts = tuple(tests[name, contender.name][number] for name in names)
                runs.append(Score(parts, baselines, len(self.seeds)))
        return runs


@dataclass(frozen=True)
class Score(Run):
    """A contender's decathlon score over all problems, for one seed.

    Args:
        parts: the contender's result per problem.
        baselines: the baseline's mean accuracies in %, by problem.
        seeds: number of seeds in these means.
    """

    parts: tuple[Result, ...]
    baselines: dict[str, float]
    seeds: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (key_of(parts=[part.key for part in self.parts], baselines=self.baselines),)

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        yield self.result()

    def result(self) -> Result:
        """Compute the score and the summed costs."""
        accuracies = {part.problem: 100 * part.score for part in self.parts}
        first = self.parts[0]
        total = 1 + sum(part.trained + part.head for part in self.parts) / first.backbone
        return dataclasses.replace(
            first,
            key=self.keys[0],
            experiment="decathlon",
            problem="all",
            metric="decathlon",
            score=score(accuracies, self.baselines),
            trained=sum(part.trained for part in self.parts),
            head=sum(part.head for part in self.parts),
            seconds=sum(part.seconds for part in self.parts),
            bytes=sum(part.bytes for part in self.parts),
            facts={"problems": list(accuracies), "seeds": self.seeds, "total": total},
            setting=None,
        )


def scores_of(tests: Sequence[Result], baseline: str) -> list[Result]:
    """Compute the scores of contenders that were compared on several domains anyway.

    Args:
        tests: test results of contenders on problems of one network.
        baseline: name of the contender that scores are relative to.

    Returns:
        One score per contender and seed with results on every problem of the baseline on which it makes errors.
    """
    errors: dict[str, list[float]] = {}
    for result in tests:
        if result.contender == baseline:
            errors.setdefault(result.problem, []).append(100 * (1 - result.score))
    baselines = {problem: 100 - mean(each) for problem, each in sorted(errors.items()) if mean(each) > 0}
    seeds = max(map(len, errors.values()), default=0)
    runs: dict[tuple[str, int], dict[str, Result]] = {}
    for result in tests:
        if result.problem in baselines:
            runs.setdefault((result.contender, result.seed), {})[result.problem] = result
    return [
        Score(tuple(by[name] for name in baselines), baselines, seeds).result()
        for by in runs.values()
        if baselines and by.keys() == baselines.keys()
    ]
