"""Tasks learned one after another: their total size, and whether earlier ones are forgotten."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from visadapt.errors import VisadaptError
from visadapt.experiments.base import Experiment
from visadapt.experiments.contenders import Contender
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Result, key_of
from visadapt.experiments.run import Lookup, Run, TrainingRun
from visadapt.experiments.train import Workspace, costs, load_task, measure, save_task, train
from visadapt.experiments.transplant import body_tensors, start_from
from visadapt.methods import Full
from visadapt.training import Samples, predict


@dataclass(frozen=True)
class Sequence(Experiment):
    """Learn all problems in turn on one network, and after each measure every problem learned so far again.

    A contender gives each problem its own task, which later ones do not change. Sequential fine-tuning is the
    alternative without tasks: the weights are trained on from problem to problem, and earlier problems keep only their
    heads.

    Facts: ``position`` of the problem learned last, from 0; ``after``, its name; ``total``, the parameters so far as a
    multiple of the backbone's; ``outputs``, a hash of the logits of the first 256 test samples. If ``outputs`` equals
    that of the position where the problem was learned, nothing was forgotten, bit for bit.

    Args:
        problems: problems in the order of learning, all on one backbone.
        contenders: contenders to train.
        sequential: a contender with `visadapt.methods.Full`; None to leave sequential fine-tuning out.
        seeds: one sequence each.

    Raises:
        VisadaptError: the problems have different backbones or the same name, or ``sequential`` has another method.

    Examples:
        >>> from visadapt.experiments import Sequence, contender, problem
        >>> digits = problem("timm/resnet18", "digits")
        >>> mnist = problem("timm/resnet18", "mnist")
        >>> experiment = Sequence((digits, mnist), (contender("bottleneck m=8"),), seeds=(0,))
        >>> len(experiment.runs(lambda key: None))  # runs that need no other result
        1
    """

    name: ClassVar[str] = "sequence"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    sequential: Contender | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        networks = {f"{p.network} {dict(p.options)}" for p in self.problems}
        if len(networks) != 1:
            raise VisadaptError(f"the problems of a sequence must have one network, got {sorted(networks)}")
        names = [p.name for p in self.problems]
        if len(set(names)) != len(names):
            raise VisadaptError(f"the problems of a sequence must have different names, got {names}")
        if self.sequential is not None and not isinstance(self.sequential.method, Full):
            raise VisadaptError(f"the method of sequential fine-tuning must be Full, got {self.sequential.method}")

    def runs(self, lookup: Lookup) -> list[Chain]:
        chains = [(contender, False) for contender in self.contenders]
        if self.sequential is not None:
            chains.append((dataclasses.replace(self.sequential, name="sequential fine-tuning"), True))
        return [Chain(self.problems, contender, seed, shared) for contender, shared in chains for seed in self.seeds]


@dataclass(frozen=True)
class Chain(Run):
    """One contender trained on all problems in turn.

    Args:
        problems: problems in the order of learning.
        contender: contender to train.
        seed: seed of every training run.
        shared: all problems share the weights of the last one.
    """

    problems: tuple[Problem, ...]
    contender: Contender
    seed: int
    shared: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._key(last, index) for last in range(len(self.problems)) for index in range(last + 1))

    @property
    def task_keys(self) -> tuple[str, ...]:
        return tuple(map(self._history, range(len(self.problems))))

    def _key(self, last: int, measured: int) -> str:
        return key_of(chain=self._history(last), asked=measured)

    def _history(self, last: int) -> str:
        order = [problem.described() for problem in self.problems[: last + 1]]
        return key_of(order=order, contender=self.contender.described(), seed=self.seed, shared=self.shared)

    def results(self, missing: Collection[str], workspace: Workspace) -> Iterator[Result]:
        model = self.problems[0].fresh().to(workspace.device)
        total = 0
        for last, problem in enumerate(self.problems):
            seconds = self._learn(model, last, workspace)
            task_costs = costs(model, problem.name, seconds)
            total += task_costs["head"] + (0 if self.shared else task_costs["trained"])
            for index, earlier in enumerate(self.problems[: last + 1]):
                key = self._key(last, index)
                if key in missing:
                    facts = {"position": last, "after": problem.name, "total": 1 + total / task_costs["backbone"]}
                    yield self._measured(model, key, earlier, facts, seconds, workspace)

    def _learn(self, model: nn.Module, last: int, workspace: Workspace) -> float:
        """Train the next task, or load it from an earlier, interrupted run; return the seconds of its training."""
        problem = self.problems[last]
        file = workspace.task_file(self._history(last))
        if file.is_file():
            seconds = load_task(model, file)
        else:
            self.contender.put(problem, self.seed, model)
            if self.shared and last > 0:
                start_from(model, problem.name, body_tensors(model, self.problems[last - 1].name))
            seconds = train(model, problem, self.contender, self.seed, workspace)
            save_task(model, problem.name, file, seconds)
        if self.shared:
            for earlier in self.problems[:last]:
                start_from(model, earlier.name, body_tensors(model, problem.name))
        return seconds

    def _measured(
        self, model: nn.Module, key: str, problem: Problem, facts: dict[str, Any], seconds: float, workspace: Workspace
    ) -> Result:
        task = problem.name
        score = measure(model, task, problem, "test", workspace)
        inputs, _ = problem.splits.test.take(torch.arange(min(256, len(problem.splits.test))))
        logits = predict(model, task, Samples(inputs), prepare=problem.prepare, device=workspace.device)
        outputs = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
        training = TrainingRun("sequence", problem, self.contender, self.seed)
        result = training.result(key, score, seconds, workspace, costs(model, task, seconds))
        return dataclasses.replace(result, facts={**facts, "outputs": outputs})
