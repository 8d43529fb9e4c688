"""Runs: pieces of work that give results, described so that any process can do them, and none does one twice."""

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
from visadapt.experiments.record import STOPPED, Result, key_of
from visadapt.experiments.train import Workplace, costs, keep, kept, measure, train
from visadapt.experiments.transplant import start_from
from visadapt.task_file import read
from visadapt.training import Diverged

Found = Callable[[str], "Result | None"]
"""Gives the result of a key, or None if it is yet to be made."""


class Run(ABC):
    """A piece of work."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Those of all its results."""

    @abstractmethod
    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        """Makes the results of these keys, one after another, each as soon as it is known."""

    def adopted(self, result: Result) -> Result:
        """The same figure, made for another experiment, as this run tells it."""
        return result


@dataclass(frozen=True)
class Training(Run):
    """A contender trained once on a problem and measured.

    Args:
        experiment: that asks for it.
        problem: to train on.
        contender: whom.
        seed: of the new parts, the order and dropout.
        split: to measure on.
        facts: the experiment's coordinates.
        start: a training of the same contender on another problem of the same backbone; its task's parts, but for the
            head, are what this one starts from.
        keep: whether the task's file is kept for others.
    """

    experiment: str
    problem: Problem
    contender: Contender
    seed: int
    split: str = "test"
    facts: dict[str, Any] = field(default_factory=dict)
    start: Training | None = None
    keep: bool = False

    @property
    def task_key(self) -> str:
        """Of the trained task, whatever it is measured on."""
        start = {} if self.start is None else {"start": self.start.task_key}
        described = {"problem": self.problem.described(), "contender": self.contender.described()}
        return key_of(**described, seed=self.seed, **start)

    @property
    def setting(self) -> str:
        """The same for all seeds and learning rates, splits and starts."""
        at_any_rate = self.contender.with_recipe(lr=1.0)
        return key_of(problem=self.problem.described(), contender=at_any_rate.described())

    @property
    def key(self) -> str:
        """Of the result."""
        return key_of(task=self.task_key, split=self.split)

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        yield self.measured(*self.trained(workplace), workplace)

    def measured(self, model: nn.Module, seconds: float, workplace: Workplace) -> Result:
        """The result of a model that was trained so long."""
        score = measure(model, self.problem.name, self.problem, self.split, workplace)
        return self.result(self.key, score, seconds, workplace, costs(model, self.problem.name, seconds))

    def result(self, key: str, score: float, seconds: float, workplace: Workplace, paid: dict[str, int]) -> Result:
        """A result of this contender on this problem."""
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
            machine=machine(workplace.device),
            setting=self.setting,
            **paid,
        )

    def adopted(self, result: Result) -> Result:
        facts = {**self.facts, **{name: fact for name, fact in result.facts.items() if name == STOPPED}}
        return dataclasses.replace(
            result, experiment=self.experiment, contender=self.contender.name, setting=self.setting, facts=facts
        )

    def trained(self, workplace: Workplace) -> tuple[nn.Module, float]:
        """The model with the trained task, and the seconds that the training took; read from its file if that is kept.

        A file is as good as the training: it gives the same outputs, bit for bit.
        """
        file = workplace.task_file(self.task_key)
        if file.is_file():
            model = self.problem.fresh().to(workplace.device)
            return model, kept(model, file)
        model = self.contender.put(self.problem, self.seed)
        if self.start is not None:
            start_from(model, self.problem.name, self.start.tensors(workplace))
        try:
            seconds = train(model, self.problem, self.contender, self.seed, workplace)
        except Diverged as error:
            whose = f"{self.contender.name} on {self.problem.backbone}, {self.problem.name}, seed {self.seed}"
            raise Diverged(f"{whose}: {error}") from error
        if self.keep:
            keep(model, self.problem.name, file, seconds)
        return model, seconds

    def tensors(self, workplace: Workplace) -> dict[str, Tensor]:
        """Those of the trained task, by name."""
        file = workplace.task_file(self.task_key)
        if not file.is_file():
            dataclasses.replace(self, keep=True).trained(workplace)
        return read(file).tensors


@dataclass(frozen=True)
class Trial(Training):
    """A training that may diverge: that, too, is a result.

    Its score is then that of the untrained task (0 if that gives no numbers), and its fact ``stopped`` is the reason.
    """

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        try:
            yield from super().results(missing, workplace)
        except Diverged as error:
            untrained = self.contender.put(self.problem, self.seed).to(workplace.device)
            try:
                result = self.measured(untrained, 0.0, workplace)
            except Diverged:  # not even the first weights give numbers
                result = self.result(self.key, 0.0, 0.0, workplace, costs(untrained, self.problem.name, 0.0))
            yield dataclasses.replace(result, facts={**self.facts, STOPPED: str(error)})
