"""``fit``, which trains a task."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from visadapt.data.samples import ready
from visadapt.errors import VisadaptError
from visadapt.frozen.cached_prefix import CachedPrefix
from visadapt.training.batches import Batches
from visadapt.training.checkpoint import Checkpoint
from visadapt.training.engine import Engine, Performer
from visadapt.training.evaluation import Prepare, outputs
from visadapt.training.history import Epoch, Fit
from visadapt.training.log import Log
from visadapt.training.loop import Augment, Loop
from visadapt.training.losses import check_labels
from visadapt.training.metrics import METRICS, check_metric
from visadapt.training.progress import bar
from visadapt.training.recipe import Recipe
from visadapt.training.rng import Randomness
from visadapt.training.signature import identity
from visadapt.training.target import Trainee, alone, trainee


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
    precision: str | None = None,
    accumulate: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log: Log | Sequence[Log] = (),
    progress: bool = True,
) -> Fit:
    """Trains one task of a model; the backbone and the other tasks stay bit for bit what they were.

    With validation data the state after the best epoch is the one that is left in the model, else the last. The same
    seed gives the same numbers on the same machine; the caller's random numbers stay as they were.

    Started by ``accelerate launch`` or ``torchrun``, each process computes its part of every batch, and the numbers are
    those of one process, but for the statistics that norms take of a batch and what is drawn at random. The running
    statistics that a task owns are the first process's.

    Args:
        model: an injected model; or a plain one, to compare with.
        task: name of the task. None trains every parameter of a plain model that requires a gradient.
        train: a pair of inputs and labels, where inputs are a tensor ``(N, …)`` or a mapping of tensors by the model's
            argument names; an :class:`~visadapt.data.ImageSplit`; a mapping with ``labels``; or a ``DataLoader`` of
            such batches. Labels are class indices, for cross entropy; or floats, for the squared error of one output.
        validation: the same, to score each epoch with.
        recipe: :class:`Recipe`'s defaults if None.
        prepare: makes what the model takes of a batch of inputs on the device, in training and validation. None
            normalises uint8 images and cuts padding off tokenised texts.
        augment: changes a batch of training inputs before ``prepare``, given a generator to draw from.
        metric: what the best epoch is best at; a name in ``METRICS``.
        seed: of the order, of dropout and of augmentation; adapters and heads drew theirs at ``inject``.
        device: None for where the model is; otherwise the model is moved there.
        precision: ``fp32``, or ``bf16`` for autocast; None is what ``accelerate launch`` was told, or ``fp32``.
        accumulate: parts that each step's batch is computed in, to save memory. Where norms take no statistics of a
            batch, the numbers are those of the whole.
        checkpoint: a file that is written after each epoch. Called again alike, a training that was stopped goes on
            from it, bit for bit and to the same final numbers, and one that was finished returns at once. A
            ``prepare`` that is a dataclass has to be equal; what other functions do cannot be told.
        checkpoint_every: steps after which it is written as well.
        log: called after each epoch: :class:`JsonLines`, :class:`TensorBoard`, or any function of a :class:`Fit`.
        progress: shows a bar on a terminal, if rich is installed.

    Returns:
        The loss and score of each epoch.

    Raises:
        VisadaptError: no such task, metric or device; data that cannot be trained on; a checkpoint of another training
            (what differs is named); a loss, gradient or logit that is not finite, in which case the task is left as it
            was after its best epoch so far (before the first one, as it came).
    """
    recipe = Recipe() if recipe is None else recipe
    _check(recipe, validation, accumulate=accumulate, checkpoint_every=checkpoint_every)
    if checkpoint_every is not None and checkpoint is None:
        raise VisadaptError(f"checkpoint_every={checkpoint_every} needs a checkpoint, the file to write")
    cached = prepare if isinstance(prepare, CachedPrefix) else None
    if cached is not None:
        cached.check(model, task)
        if augment is not None:
            raise VisadaptError(
                "augment changes inputs, and prepare is a cache of these: give it to cache_prefix instead"
            )
    trained = trainee(model, task)
    source = Batches(train, recipe.batch_size, "training")
    held = None if validation is None else Batches(validation, max(recipe.batch_size, 100), "validation")
    check_metric(metric, source.labels, trained.classes)
    for batches in filter(None, (source, held)):
        if batches.labels is not None and trained.classes is not None:
            check_labels(batches.labels, trained.classes, batches.what)
    engine = Engine(model, device, precision, accumulate)
    settings = {
        "recipe": recipe,
        "metric": metric,
        "seed": seed,
        "inputs": cached.identity if cached is not None else prepare if dataclasses.is_dataclass(prepare) else None,
        "augmentation": augment is not None,
        **engine.settings,
    }
    saved = None if checkpoint is None else Checkpoint(checkpoint, identity(model, task, source, held, **settings))
    # a move to another device may have made new tensors
    trained = trainee(model, task)
    performer = Performer(model, prepare or ready, engine)
    random = Randomness(seed, engine.device, engine.rank)
    logs = (log,) if callable(log) else tuple(log)
    was = model.training
    with random, alone(model, trained, engine.processes):
        loop = Loop(performer, trained, source, recipe, augment, random)
        if saved is not None:
            saved.begin(loop)

        def told() -> Fit:
            size = sum(p.numel() for p in trained.parameters.values())
            return Fit(task, tuple(loop.run.epochs), metric, loop.run.best, loop.run.steps, size)

        def stepped() -> None:
            advance(f"loss {loop.run.loss / loop.run.seen:.3f}")
            if saved is not None and checkpoint_every is not None and loop.run.steps % checkpoint_every == 0:
                saved.write(loop)

        title = task or type(model).__name__
        try:
            with bar(loop.steps, title, progress and engine.rank == 0, loop.run.steps) as advance:
                while not loop.over:
                    start = time.perf_counter()
                    loss = loop.epoch(stepped)
                    score = None if held is None else _score(performer, trained, held, metric)
                    better = score is None or not loop.run.best or _better(score, told().score, metric)
                    loop.ended(Epoch(len(loop.run.epochs) + 1, loss, score, time.perf_counter() - start), better)
                    if saved is not None:
                        saved.write(loop)
                    for each in logs if engine.rank == 0 else ():
                        each(told())
            trained.restore(loop.kept)
        except VisadaptError:
            trained.restore(loop.kept)
            raise
        finally:
            model.train(was)
            for parameter in trained.parameters.values():
                parameter.grad = None
    return told()


def _check(recipe: Any, validation: Any, **counts: int | None) -> None:
    if not isinstance(recipe, Recipe):
        raise VisadaptError(f"recipe is a visadapt.training.Recipe, got {type(recipe).__name__}")
    if recipe.patience is not None and validation is None:
        raise VisadaptError(f"patience={recipe.patience} waits for a better score, but there is no validation data")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise VisadaptError(f"{name} is a positive int, got {count!r}")


def _score(performer: Performer, trained: Trainee, data: Batches, metric: str) -> float:
    logits, labels = outputs(performer, trained, data)
    assert labels is not None
    check_metric(metric, labels)
    return METRICS[metric](logits, labels)


def _better(score: float, than: float | None, metric: str) -> bool:
    if than is None or math.isnan(than):
        return True
    return score < than if metric == "loss" else score > than
