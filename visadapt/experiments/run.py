"""Runs: units of work that compute results. A run is plain data, so any process can execute it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visadapt.experiments.contenders import Contender
from visadapt.experiments.machine import machine
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import KEPT, STOPPED, Result, key_of
from visadapt.experiments.train import Workspace, costs, load_task, measure, save_task, train
from visadapt.experiments.transplant import start_from
from visadapt.runtime.registry import tasks
from visadapt.task_file import read
from visadapt.training import Diverged

Lookup = Callable[[str], "Result | None"]
"""Returns the result of a key, or None if it does not exist yet."""


class Run(ABC):
    """A unit of work."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The keys of all its results."""

    @abstractmethod
    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        """Compute the results of the missing keys, and yield each as soon as it is known."""

    @property
    def task_keys(self) -> tuple[str, ...]:
        """The keys of the task files that it may keep; see `Workspace.task_file`."""
        return ()

    def adopt(self, result: Result) -> Result:
        """Relabel a result of the same key from another experiment as this run's."""
        return result


@dataclass(frozen=True)
class TrainingRun(Run):
    """A contender trained once on a problem and measured.

    Args:
        experiment: name of the experiment.
        problem: problem to train on.
        contender: contender to train.
        seed: seed of the new parameters, the order of samples and dropout.
        split: split to measure on.
        facts: the experiment's coordinates.
        start: a training run of the same contender on another problem with the same backbone, whose trained parameters,
            except the head's, are the initial values.
        keep: keep the task file for other runs.
    """

    experiment: str
    problem: Problem
    contender: Contender
    seed: int
    split: str = "test"
    facts: dict[str, Any] = field(default_factory=dict)
    start: TrainingRun | None = None
    keep: bool = False

    @property
    def task_key(self) -> str:
        """Key of the trained task, independent of the split that it is measured on."""
        start = {} if self.start is None else {"start": self.start.task_key}
        described = {"problem": self.problem.described(), "contender": self.contender.described()}
        return key_of(**described, seed=self.seed, **start)

    @property
    def task_keys(self) -> tuple[str, ...]:
        return (self.task_key,)

    @property
    def setting(self) -> str:
        """Key of the problem and the contender, the same for all seeds, splits, starts, and what validation chooses."""
        return key_of(problem=self.problem.described(), contender=self.contender.setting())

    @property
    def key(self) -> str:
        """Key of the result."""
        return key_of(task=self.task_key, split=self.split)

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        yield self.measured(*self.trained(workspace), workspace)

    def measured(self, model: nn.Module, seconds: float, workspace: Workspace) -> Result:
        """Measure a model that was trained for so many seconds."""
        return self.scored(model, seconds, workspace, self.costs(model, seconds, workspace))

    def costs(self, model: nn.Module, seconds: float, workspace: Workspace) -> dict[str, int]:
        """Count the trained task's parameters and the bytes of its file."""
        return costs(model, self.problem.name, seconds, workspace.task_file(self.task_key))

    def scored(self, model: nn.Module, seconds: float, workspace: Workspace, task_costs: dict[str, int]) -> Result:
        """Measure a model whose costs are known."""
        score = measure(model, self.problem.name, self.problem, self.split, workspace)
        kept = {name: value for name, value in tasks(model)[self.problem.name].notes.items() if name == KEPT}
        result = self.result(self.key, score, seconds, workspace, task_costs)
        return dataclasses.replace(result, facts={**self.facts, **kept})

    def result(
        self, key: str, score: float, seconds: float, workspace: Workspace, task_costs: dict[str, int]
    ) -> Result:
        """Build a result of this contender on this problem."""
        return Result(
            key=key,
            experiment=self.experiment,
            modality=self.problem.modality,
            network=self.problem.backbone,
            problem=self.problem.name,
            contender=self.contender.name,
            seed=self.seed,
            split=self.split,
            metric=self.problem.metric,
            score=score,
            seconds=seconds,
            lr=self.contender.recipe.lr,
            epochs=self.contender.recipe.epochs,
            facts=self.facts,
            machine=machine(workspace.device),
            setting=self.setting,
            regime=workspace.regime,
            samples=len(getattr(self.problem.splits, self.split)),
            **task_costs,
        )

    def adopt(self, result: Result) -> Result:
        facts = {**self.facts, **{name: fact for name, fact in result.facts.items() if name in (KEPT, STOPPED)}}
        return dataclasses.replace(
            result, experiment=self.experiment, contender=self.contender.name, setting=self.setting, facts=facts
        )

    def trained(self, workspace: Workspace) -> tuple[nn.Module, float]:
        """Return the model with the trained task, and the duration of its training run in seconds.

        Loads the task file if it was kept: the outputs are the same, bit for bit.

        Raises:
            Diverged: training ended in numbers that are not finite.
        """
        file = workspace.task_file(self.task_key)
        if file.is_file():
            model = self.problem.fresh().to(workspace.device)
            return model, load_task(model, file)
        model = self.contender.put(self.problem, self.seed)
        if self.start is not None:
            start_from(model, self.problem.name, self.start.tensors(workspace))
        try:
            seconds = train(model, self.problem, self.contender, self.seed, workspace)
        except Diverged as error:
            run = f"{self.contender.name} on {self.problem.backbone}, {self.problem.name}, seed {self.seed}"
            raise Diverged(f"{run}: {error}") from error
        if self.keep:
            save_task(model, self.problem.name, file, seconds)
        return model, seconds

    def tensors(self, workspace: Workspace) -> dict[str, Tensor]:
        """Return the tensors of the trained task by name; train it first if its file was not kept."""
        file = workspace.task_file(self.task_key)
        if not file.is_file():
            dataclasses.replace(self, keep=True).trained(workspace)
        return read(file).tensors


@dataclass(frozen=True)
class BothSplits(TrainingRun):
    """A training run that is measured on test data, and on validation data to choose between contenders."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(run.key for run in self._measurements())

    def _measurements(self) -> tuple[TrainingRun, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return tuple(TrainingRun(**{**fields, "split": split}) for split in ("validation", "test"))

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        model, seconds = self.trained(workspace)
        task_costs = self.costs(model, seconds, workspace)
        for run in self._measurements():
            if run.key in missing:
                yield run.scored(model, seconds, workspace, task_costs)


@dataclass(frozen=True)
class Trial(TrainingRun):
    """A training run whose divergence is a result too.

    The score is then that of the untrained task (0 if its outputs are not finite), and the fact ``stopped`` the reason.
    """

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        try:
            yield from super().results(missing, workspace)
        except Diverged as error:
            untrained = self.contender.put(self.problem, self.seed).to(workspace.device)
            try:
                result = self.measured(untrained, 0.0, workspace)
            except Diverged:  # the untrained task's outputs are not finite either
                result = self.result(self.key, 0.0, 0.0, workspace, costs(untrained, self.problem.name, 0.0))
            yield dataclasses.replace(result, facts={**self.facts, STOPPED: str(error)})
