"""The steps of a training, one epoch after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visadapt.data.samples import Samples
from visadapt.training.batches import Batches
from visadapt.training.engine import Performer
from visadapt.training.history import Epoch
from visadapt.training.losses import Diverged, check_labels, losses
from visadapt.training.recipe import Recipe
from visadapt.training.rng import Randomness
from visadapt.training.target import Trainee

Augment = Callable[[Any, torch.Generator], Any]


@dataclass
class Run:
    """How far a training has come, in numbers.

    Attributes:
        epochs: those that are over.
        best: number of the best of them; 0 before the first.
        steps: optimiser steps taken.
        at: those of the epoch that is under way.
        loss: sum over its samples so far.
        seen: number of its samples so far.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    at: int = 0
    loss: float = 0.0
    seen: int = 0


class Loop:
    """A training under way.

    Attributes:
        run: how far it has come.
        steps: of the whole training.
        kept: the state after the best epoch so far; before the first, the state that the task came in.
        began: where the random numbers were when the epoch under way began.
        random: where they are.
    """

    def __init__(
        self,
        performer: Performer,
        trained: Trainee,
        source: Batches,
        recipe: Recipe,
        augment: Augment | None,
        random: Randomness,
    ) -> None:
        self.trained, self.source, self.recipe, self.augment, self.random = trained, source, recipe, augment, random
        self.engine = performer.engine
        source.share(self.engine)
        random.follow(source.generator)
        self.run = Run()
        self.steps = recipe.epochs * len(source)
        self.kept = trained.snapshot()
        self.began = random.state()
        # not accelerate's own optimiser: it waits for an accumulation that a script may have begun before it came here
        self.optimiser, self.schedule = recipe.prepared(trained, self.steps)
        self.performer = self.engine.accelerator.prepare(performer)

    @property
    def over(self) -> bool:
        """Whether there is no epoch to come."""
        done, patience = len(self.run.epochs), self.recipe.patience
        return done == self.recipe.epochs or (patience is not None and done - self.run.best >= patience)

    def epoch(self, stepped: Callable[[], None]) -> float:
        """One pass, or what is left of it, and the mean loss of its steps.

        Args:
            stepped: called after each step.
        """
        run = self.run
        self.performer.train()
        here = self.random.state()
        if run.at == 0:
            self.began = here
        # what was drawn up to here in a pass that was interrupted is drawn again, so that the rest of it is the same
        self.random.restore(self.began)
        batches = self.source.epoch(self.random.order)
        for _ in range(run.at):
            next(batches)
        self.random.restore(here)
        with self.trained.chosen():
            for inputs, labels, rows in batches:
                assert labels is not None
                run.loss += self.step(inputs, labels, rows) * rows
                run.seen, run.at, run.steps = run.seen + rows, run.at + 1, run.steps + 1
                stepped()
        # the running statistics that a task owns are each process's own until here
        self.engine.agree([t for name, t in self.trained.tensors.items() if name not in self.trained.parameters])
        return run.loss / run.seen

    def ended(self, epoch: Epoch, better: bool) -> None:
        """Notes an epoch, and keeps the state if it is the best so far."""
        self.run.epochs.append(epoch)
        self.run.at, self.run.loss, self.run.seen = 0, 0.0, 0
        if better:
            self.run.best, self.kept = epoch.number, self.trained.snapshot()

    def step(self, inputs: Any, labels: Tensor, rows: int) -> float:
        """Moves the parameters once; the mean loss of the whole batch before it."""
        engine, accelerator = self.engine, self.engine.accelerator
        inputs, labels = engine.place(inputs), engine.place(labels)
        if self.augment is not None:
            inputs = self.augment(inputs, self.random.noise)
        own = Samples(inputs, labels)
        size = -(-len(own) // engine.parts)
        total = torch.zeros((), device=engine.device)
        self.optimiser.zero_grad(set_to_none=True)
        for start in range(0, len(own), size):
            last = start + size >= len(own)
            with nullcontext() if last else accelerator.no_sync(self.performer):
                part, targets = own.take(slice(start, start + size))
                assert targets is not None
                logits = self.performer(part)
                if self.run.steps == 0:
                    check_labels(targets, logits.shape[-1], self.source.what)
                each = losses(logits, targets, self.recipe.label_smoothing)
                # without those samples that only fill up this process's part of the batch
                loss = each[: max(0, rows - engine.rank * len(own) - start)].sum() / rows
                # accelerate takes the mean over the parts, and DDP over the processes
                accelerator.backward(loss * (engine.parts * engine.processes))
                total += loss.detach()
        value: float = accelerator.reduce(total, "sum").item()
        if not math.isfinite(value):
            raise self.stopped("loss", value)
        limit = math.inf if self.recipe.grad_clip is None else self.recipe.grad_clip
        norm: float = accelerator.clip_grad_norm_(self.trained.parameters.values(), limit).item()
        if not math.isfinite(norm):
            raise self.stopped("gradient", norm)
        self.optimiser.step()
        self.schedule.step()
        return value

    def stopped(self, what: str, value: float) -> Diverged:
        """The error of a loss or gradient that is not finite."""
        return Diverged(
            f"the {what} became {value} at step {self.run.steps + 1} of {self.steps}; the last good state is kept. Try "
            f"a smaller lr than {self.recipe.lr:g}, or look for inputs that are not finite"
        )
