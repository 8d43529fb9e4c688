"""``fit``, the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.errors import VisadaptError
from visadapt.methods.method import check_choice
from visadapt.training.engine import Engine, call
from visadapt.training.evaluate import Prepare, check_labels, outputs
from visadapt.training.history import Epoch, Fit
from visadapt.training.metrics import METRICS
from visadapt.training.progress import Advance, bar
from visadapt.training.recipe import Recipe
from visadapt.training.samples import Batches, ready
from visadapt.training.trainee import Trainee, trainee

Augment = Callable[[Any, torch.Generator], Any]


def fit(
    model: nn.Module,
    task: str | None,
    train: Any,
    validation: Any = None,
    recipe: Recipe | None = None,
    *,
    prepare: Prepare | None = None,
    augment: Augment | None = None,
    metric: str = "accuracy",
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    progress: bool = True,
) -> Fit:
    """Trains one task of a model by cross entropy; the backbone and the other tasks stay bit for bit what they were.

    With validation data the state after the best epoch is the one that is left in the model, else the last. The same
    seed gives the same numbers on the same machine; the caller's random numbers stay as they were.

    Args:
        model: an injected model; or a plain one, to compare with.
        task: name of the task. None trains every parameter of a plain model that requires a gradient.
        train: a pair of inputs and labels, where inputs are a tensor ``(N, …)`` or a mapping of tensors by the model's
            argument names; an :class:`~visadapt.data.ImageSplit`; a mapping with ``labels``; or a ``DataLoader`` of
            such batches. Labels are class indices.
        validation: the same, to score each epoch with.
        recipe: :class:`Recipe`'s defaults if None.
        prepare: makes what the model takes of a batch of inputs on the device, in training and validation. None
            normalises uint8 images and cuts padding off tokenised texts.
        augment: changes a batch of training inputs before ``prepare``, given a generator to draw from.
        metric: what the best epoch is best at; a name in ``METRICS``.
        seed: of the order, of dropout and of augmentation; adapters and heads drew theirs at ``inject``.
        device: None for where the model is; otherwise the model is moved there.
        precision: ``fp32``, or ``bf16`` for autocast.
        progress: shows a bar on a terminal, if rich is installed.

    Returns:
        The loss and score of each epoch.

    Raises:
        VisadaptError: no such task, metric or device; data that cannot be trained on; a loss or gradient that is not
            finite, in which case the task is left as it was after its best epoch so far (before the first one, as it
            came).
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise VisadaptError(f"recipe is a visadapt.training.Recipe, got {type(recipe).__name__}")
    check_choice(metric, METRICS, "metric")
    trained = trainee(model, task)
    source = Batches(train, recipe.batch_size, "training")
    held = None if validation is None else Batches(validation, max(recipe.batch_size, 100), "validation")
    for batches in filter(None, (source, held)):
        if batches.samples is not None and batches.samples.labels is not None and trained.classes is not None:
            check_labels(batches.samples.labels, trained.classes, batches.what)
    engine = Engine(model, device, precision)
    # a move to another device may have made new tensors
    trained = trainee(model, task)
    loop = _Loop(model, trained, source, engine, recipe, prepare or ready, augment, seed)
    was = model.training
    epochs: list[Epoch] = []
    best, kept = 0, trained.snapshot()
    title = task or type(model).__name__
    try:
        with engine.seeded(seed), bar(loop.steps, title, progress) as advance:
            for number in range(1, recipe.epochs + 1):
                start = time.perf_counter()
                loss = loop.epoch(advance)
                score = None
                if held is not None:
                    score = METRICS[metric](*_both(outputs(model, trained, held, engine, loop.prepare)))
                epochs.append(Epoch(number, loss, score, time.perf_counter() - start))
                if best == 0 or score is None or _better(score, epochs[best - 1].score, metric):
                    best, kept = number, trained.snapshot()
        if best != len(epochs):
            trained.restore(kept)
    except VisadaptError:
        trained.restore(kept)
        raise
    finally:
        model.train(was)
        for parameter in trained.parameters.values():
            parameter.grad = None
    size = sum(p.numel() for p in trained.parameters.values())
    return Fit(task, tuple(epochs), metric, best, loop.steps, size)


class _Loop:
    """One epoch after another, with what lasts from one to the next."""

    def __init__(
        self,
        model: nn.Module,
        trained: Trainee,
        source: Batches,
        engine: Engine,
        recipe: Recipe,
        prepare: Prepare,
        augment: Augment | None,
        seed: int,
    ) -> None:
        self.model, self.trained, self.source, self.engine, self.recipe = model, trained, source, engine, recipe
        self.prepare, self.augment = prepare, augment
        self.steps = recipe.epochs * len(source)
        self.parameters = list(trained.parameters.values())
        self.optimiser, self.schedule = recipe.prepared(trained, self.steps)
        # one generator each: the order does not change with the augmentation
        self.order = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.done = 0

    def epoch(self, advance: Advance) -> float:
        """One pass; the mean of the steps' losses."""
        self.model.train()
        total, count = 0.0, 0
        with self.trained.chosen():
            for inputs, labels in self.source.epoch(self.order):
                assert labels is not None
                loss = self.step(inputs, labels)
                total, count = total + loss * len(labels), count + len(labels)
                advance(f"loss {total / count:.3f}")
        return total / count

    def step(self, inputs: Any, labels: Tensor) -> float:
        inputs, labels = self.engine.place(inputs), self.engine.place(labels)
        if self.augment is not None:
            inputs = self.augment(inputs, self.noise)
        with self.engine.autocast():
            logits = call(self.model, self.prepare(inputs))
        if self.done == 0:
            check_labels(labels, logits.shape[-1], self.source.what)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise self.stopped("loss", value)
        self.optimiser.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        norm = self.engine.clip(self.parameters, self.recipe.grad_clip)
        if not math.isfinite(norm):
            raise self.stopped("gradient", norm)
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        return value

    def stopped(self, what: str, value: float) -> VisadaptError:
        return VisadaptError(
            f"the {what} became {value} at step {self.done + 1} of {self.steps}; the last good state is kept. Try a "
            f"smaller lr than {self.recipe.lr:g}, or look for inputs that are not finite"
        )


def _both(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    logits, labels = found
    assert labels is not None
    return logits, labels


def _better(score: float, than: float | None, metric: str) -> bool:
    if than is None or math.isnan(than):
        return True
    return score < than if metric == "loss" else score > than
