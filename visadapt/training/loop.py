"""The optimiser steps of a training run, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visadapt.data.samples import Samples
from visadapt.training.augmenting import Changes
from visadapt.training.batches import Batches
from visadapt.training.engine import LogitsModel
from visadapt.training.history import Epoch
from visadapt.training.losses import Diverged, width_of
from visadapt.training.recipe import Recipe
from visadapt.training.rng import Randomness
from visadapt.training.target import Target

READ_EVERY = 32
"""Steps whose losses and gradient norms are read from an accelerator together: each reading waits for it."""


@dataclass
class Run:
    """The progress of a training run, as it is written to a checkpoint.

    Attributes:
        epochs: finished epochs.
        best: number of the best epoch; 0 before the first.
        steps: optimiser steps taken.
        at: steps taken in the current epoch.
        loss: sum of the losses of the current epoch's samples so far.
        seen: number of the current epoch's samples so far.
        head_first: what was done about the head before the first step, in words.
        start: validation score before the first step, if it was computed.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    at: int = 0
    loss: float = 0.0
    seen: int = 0
    head_first: str = ""
    start: float | None = None


class Loop:
    """A training run in progress.

    Attributes:
        run: the progress so far.
        steps: number of steps of the whole run.
        kept: state after the best epoch so far; before the first epoch, the initial state.
        epoch_start: state of the random generators at the start of the current epoch.
        random: the random generators.
    """

    def __init__(
        self,
        logits_model: LogitsModel,
        target: Target,
        batches: Batches,
        recipe: Recipe,
        changes: Changes,
        random: Randomness,
    ) -> None:
        self.target, self.batches, self.recipe, self.changes, self.random = target, batches, recipe, changes, random
        self.engine = logits_model.engine
        batches.share(self.engine)
        random.track(batches.generator)
        self.run = Run()
        self.steps = recipe.epochs * len(batches)
        self.kept = target.snapshot()
        self.epoch_start = random.state()
        # not accelerate's optimiser: it would wait for an accumulation that the caller's script may have begun
        self.optimizer, self.schedule = recipe.make_optimizer(target, self.steps)
        # on a CPU nothing waits, and a run that diverged need not go on
        self.read_every = 1 if self.engine.device.type == "cpu" else READ_EVERY
        self._unread: list[tuple[Tensor, Tensor, int]] = []
        self.unwrapped = logits_model
        self.logits_model = self.engine.accelerator.prepare(logits_model)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or patience ran out."""
        done, patience = len(self.run.epochs), self.recipe.patience
        return done == self.recipe.epochs or (patience is not None and done - self.run.best >= patience)

    def epoch(self, after_step: Callable[[], None]) -> float:
        """Run one epoch, or the rest of an interrupted one.

        Args:
            after_step: called after each step.

        Returns:
            The mean loss of the epoch's steps.
        """
        run = self.run
        self.logits_model.train()
        now = self.random.state()
        if run.at == 0:
            self.epoch_start = now
        # replay an interrupted epoch from its start to the last batch that was used, so that the rest is the same
        self.random.restore(self.epoch_start)
        batches = self.batches.epoch(self.random.order)
        for _ in range(run.at):
            next(batches)
        self.random.restore(now)
        with self.target.context():
            for inputs, labels, rows in batches:
                assert labels is not None
                self._unread.append((*self.step(inputs, labels, rows), rows))
                run.at, run.steps = run.at + 1, run.steps + 1
                if len(self._unread) >= self.read_every:
                    self.read()
                after_step()
        self.read()
        # until here each process has its own running statistics for the task
        self.engine.broadcast([t for name, t in self.target.tensors.items() if name not in self.target.parameters])
        return run.loss / run.seen

    def begin_again(self) -> None:
        """Take the present state as the initial one."""
        self.kept, self.epoch_start = self.target.snapshot(), self.random.state()

    def end_epoch(self, epoch: Epoch, better: bool) -> None:
        """Record an epoch, and keep the state if it is the best so far."""
        self.run.epochs.append(epoch)
        self.run.at, self.run.loss, self.run.seen = 0, 0.0, 0
        if better:
            self.run.best, self.kept = epoch.number, self.target.snapshot()

    def read(self) -> None:
        """Read the losses and gradient norms of the latest steps, and add the losses to the epoch's.

        Raises:
            Diverged: one of them is not finite; the first such step is named. Later steps were taken in vain, and no
                checkpoint was written since.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([value.float() for loss, norm, _ in unread for value in (loss, norm)]).tolist()
        first = self.run.steps - len(unread) + 1
        for i, (_, _, rows) in enumerate(unread):
            for quantity, value in (("loss", values[2 * i]), ("gradient", values[2 * i + 1])):
                if not math.isfinite(value):
                    raise self.diverged(quantity, value, first + i)
            self.run.loss += values[2 * i] * rows
            self.run.seen += rows

    def step(self, inputs: Any, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Take one optimiser step; return the mean loss of the whole batch and the gradient's norm, on the device."""
        engine, accelerator = self.engine, self.engine.accelerator
        inputs, labels = self.unwrapped.place(inputs), engine.place(labels)
        inputs, labels = self.changes(inputs, labels, self.random.noise)
        samples = Samples(inputs, labels)
        size = -(-len(samples) // engine.parts)
        total = torch.zeros((), device=engine.device)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(samples), size):
            last = start + size >= len(samples)
            with nullcontext() if last else accelerator.no_sync(self.logits_model):
                part, part_labels = samples.take(slice(start, start + size))
                assert part_labels is not None
                outputs = self.logits_model(part)
                self._check(outputs, part_labels)
                # without the samples that only pad this process's part of the batch
                count = min(len(part_labels), max(0, rows - engine.rank * len(samples) - start))
                if count:
                    loss = self.batches.objective.losses(outputs[:count], part_labels[:count]).sum() / rows
                else:
                    # no loss, but DDP waits for the gradients of every process
                    loss = outputs.flatten()[:0].sum()
                # accelerate takes the mean over the parts, and DDP over the processes
                accelerator.backward(loss * (engine.parts * engine.processes))
                total += loss.detach()
        limit = math.inf if self.recipe.grad_clip is None else self.recipe.grad_clip
        norm: Tensor = accelerator.clip_grad_norm_(self.target.parameters.values(), limit)
        self.optimizer.step()
        self.schedule.step()
        return accelerator.reduce(total, "sum"), norm

    def _check(self, outputs: Tensor, labels: Tensor) -> None:
        objective, purpose = self.batches.objective, self.batches.purpose
        objective.check(outputs, labels, purpose, type(self.unwrapped.model).__name__)
        if self.run.steps == 0:
            objective.check_labels(labels, width_of(outputs), purpose)

    def diverged(self, quantity: str, value: float, step: int) -> Diverged:
        """The error for a loss or gradient that is not finite."""
        return Diverged(
            f"the {quantity} became {value} at step {step} of {self.steps}; the last good state is kept. "
            f"Try a smaller lr than {self.recipe.lr:g}, or check that all inputs are finite"
        )
