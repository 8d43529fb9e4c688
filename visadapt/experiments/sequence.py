"""Tasks learned one after another: what they cost together, and whether the earlier ones are still known."""

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
from visadapt.experiments.run import Found, Run, Training
from visadapt.experiments.train import Workplace, costs, keep, kept, measure, train
from visadapt.experiments.transplant import body, start_from
from visadapt.methods import Full
from visadapt.training import Samples, predict


@dataclass(frozen=True)
class Sequence(Experiment):
    """All problems in turn on one network; after each, every one learned so far is measured again.

    A contender gives each problem a task of its own, which no later one can touch. Sequential fine-tuning is what is
    done without tasks: the weights go on from problem to problem, earlier ones keep their head alone.

    Facts: ``position`` of the problem learned last, from 0, and its name, ``after``; ``total`` parameters by then as a
    multiple of the backbone; ``outputs``, a hash of the logits of the first 256 test samples: equal to that of the
    position where the problem was learned, nothing was forgotten, to the last bit.

    Args:
        problems: in the order of learning, all on one backbone.
        contenders: whom.
        sequential: a contender with :class:`~visadapt.methods.Full`; None leaves it out.
        seeds: each a sequence.
    """

    name: ClassVar[str] = "sequence"

    problems: tuple[Problem, ...]
    contenders: tuple[Contender, ...]
    sequential: Contender | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if len({(p.network, p.options) for p in self.problems}) != 1:
            raise VisadaptError("a sequence is learned by one network: its problems have the same one")
        if len({p.name for p in self.problems}) != len(self.problems):
            raise VisadaptError("a sequence has each problem once")
        if self.sequential is not None and not isinstance(self.sequential.method, Full):
            raise VisadaptError(f"sequential fine-tuning trains all weights, not {self.sequential.method}")

    def runs(self, found: Found) -> list[Chain]:
        chains = [(who, False) for who in self.contenders]
        if self.sequential is not None:
            chains.append((dataclasses.replace(self.sequential, name="sequential fine-tuning"), True))
        return [Chain(self.problems, who, seed, shared) for who, shared in chains for seed in self.seeds]


@dataclass(frozen=True)
class Chain(Run):
    """One contender through all problems.

    Args:
        problems: in the order of learning.
        who: the contender.
        seed: of every training.
        shared: whether all problems share the weights of the last.
    """

    problems: tuple[Problem, ...]
    who: Contender
    seed: int
    shared: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._key(last, asked) for last in range(len(self.problems)) for asked in range(last + 1))

    def _key(self, last: int, asked: int) -> str:
        return key_of(chain=self._history(last), asked=asked)

    def _history(self, last: int) -> str:
        order = [problem.described() for problem in self.problems[: last + 1]]
        return key_of(order=order, contender=self.who.described(), seed=self.seed, shared=self.shared)

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        model = self.problems[0].fresh().to(workplace.device)
        total = 0
        for last, problem in enumerate(self.problems):
            seconds = self._learn(model, last, workplace)
            paid = costs(model, problem.name, seconds)
            total += paid["head"] + (0 if self.shared else paid["trained"])
            for asked, earlier in enumerate(self.problems[: last + 1]):
                key = self._key(last, asked)
                if key in missing:
                    facts = {"position": last, "after": problem.name, "total": 1 + total / paid["backbone"]}
                    yield self._asked(model, key, earlier, facts, seconds, workplace)

    def _learn(self, model: nn.Module, last: int, workplace: Workplace) -> float:
        """Learns one more problem, or reads what an earlier, killed run had learned of it."""
        problem = self.problems[last]
        file = workplace.task_file(self._history(last))
        if file.is_file():
            seconds = kept(model, file)
        else:
            self.who.put(problem, self.seed, model)
            if self.shared and last > 0:
                start_from(model, problem.name, body(model, self.problems[last - 1].name))
            seconds = train(model, problem, self.who, self.seed, workplace)
            keep(model, problem.name, file, seconds)
        if self.shared:
            for earlier in self.problems[:last]:
                start_from(model, earlier.name, body(model, problem.name))
        return seconds

    def _asked(
        self, model: nn.Module, key: str, problem: Problem, facts: dict[str, Any], seconds: float, workplace: Workplace
    ) -> Result:
        task = problem.name
        score = measure(model, task, problem, "test", workplace)
        inputs, _ = problem.splits.test.take(torch.arange(min(256, len(problem.splits.test))))
        logits = predict(model, task, Samples(inputs), prepare=problem.prepare, device=workplace.device)
        outputs = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
        who = Training("sequence", problem, self.who, self.seed)
        result = who.result(key, score, seconds, workplace, costs(model, task, seconds))
        return dataclasses.replace(result, facts={**facts, "outputs": outputs})
