"""The training loop ``fit``."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from visadapt.arguments import takes
from visadapt.checks import check_count, is_real
from visadapt.data.augmentation import Augmentation
from visadapt.data.image_inputs import ImageInputs
from visadapt.data.lazy_images import ImageFiles
from visadapt.data.samples import ready
from visadapt.errors import VisadaptError
from visadapt.frozen.cached_prefix import CachedPrefix
from visadapt.runtime.forked import check_backward
from visadapt.runtime.modes import keep_modes
from visadapt.training.alone import beside_serving, one_at_a_time, reserved
from visadapt.training.augmenting import Augment, Changes, training_batches
from visadapt.training.batches import Batches, held_back
from visadapt.training.checkpoint import Checkpoint
from visadapt.training.engine import Engine, LogitsModel, channels_last
from visadapt.training.evaluation import Prepare, scores
from visadapt.training.head_first import start_with_head
from visadapt.training.history import Epoch, Fit
from visadapt.training.log import Log
from visadapt.training.loop import Loop
from visadapt.training.losses import Loss, Objective
from visadapt.training.progress import bar
from visadapt.training.recipe import Recipe
from visadapt.training.rng import Randomness
from visadapt.training.scoring import Metric, check_score, larger_is_better, metric_name
from visadapt.training.signature import described, identity
from visadapt.training.target import Target, only_trainable, target_of


@takes("task", "recipe", "accumulate", "checkpoint_every", "loss", "metric")
@one_at_a_time
def fit(
    model: nn.Module,
    task: str | None,
    train: Any,
    validation: Any = None,
    recipe: Recipe | None = None,
    *,
    prepare: Prepare | None = None,
    augment: Augment | None = None,
    loss: Loss | None = None,
    metric: Metric = "accuracy",
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str | None = None,
    accumulate: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    log: Log | Sequence[Log] = (),
    progress: bool = True,
) -> Fit:
    """Train one task of a model; the backbone and the other tasks stay bit-identical.

    With validation data the model ends in the state after the best epoch, or in that of the linear probe that a new
    head starts as, if no epoch is better: on that data a task never ends below its own probe. ``validation=0.1`` holds
    a tenth of the training samples back for that. Without validation data all samples train the task, and it ends in
    the state after the last epoch, which may be worse than the probe: the loss on training data cannot tell, as it
    falls while a task overfits, and rises where a recipe mixes or crops images. The same seed gives the same numbers on
    the same machine; the caller's random state is left alone.

    Under ``accelerate launch`` or ``torchrun``, each process computes its part of every batch. The results equal those
    of one process, except for batch statistics of norms and for random numbers; running statistics that the task owns
    are taken from the first process.

    Args:
        model: an injected model; or a plain one, for comparison.
        task: name of the task. None trains every parameter of a plain model that requires a gradient.
        train: a pair of inputs and labels, where inputs are a tensor ``(N, …)`` or a mapping of tensors by the model's
            argument names; an `visadapt.data.ImageSplit`; `visadapt.data.ImageFiles`, which are read in worker
            processes; a mapping with ``labels``; a data set of torch or of the ``datasets`` library, whose samples are
            such pairs or mappings; or a ``DataLoader`` of such batches. Labels are class indices, for cross entropy;
            floats, for the squared error of one output; or what ``loss`` says.
        validation: data in the same forms, to score the linear probe and each epoch; or the fraction of ``train`` to
            hold back for it, in (0, 1), chosen by ``seed``, of each class alike if the labels are in memory. None
            keeps the last epoch.
        recipe: None for the defaults of `Recipe`.
        prepare: converts a batch of inputs on the device to the model's input, in training and validation. None
            normalises uint8 images and trims the padding of tokenised texts.
        augment: changes a batch of training inputs before ``prepare``; called with the batch and a generator.
        loss: ``cross_entropy`` (of class indices, dense class indices ``(N, H, W)`` or soft targets), ``bce`` (several
            labels per sample), ``mse``, or a function of outputs and labels that returns their mean loss, or one loss
            per sample. Outputs are float32: the model's tensor, its ``logits``, or its ``out``. None chooses by the
            labels where they leave no choice (see `visadapt.training.losses.Objective`).
        metric: score that selects the best epoch; a name in ``METRICS``, a ``torchmetrics.Metric``, or a function of
            all outputs and labels, of which a larger value is better unless its ``higher_is_better`` is False.
        seed: of data order, dropout and augmentation; the initial adapters and heads were drawn at ``inject``.
        device: moves the model there; None for the model's own device.
        precision: ``fp32``, or ``bf16`` for autocast; None for that of ``accelerate launch``, or ``fp32``.
        accumulate: number of parts in which each batch is computed, to save memory. The results equal those of the
            whole batch unless norms take batch statistics.
        checkpoint: a file, written after each epoch. The same call resumes an interrupted training run from it with
            bit-identical results, and returns at once if the run was finished. A ``prepare`` that is a dataclass must
            be equal; other functions cannot be compared. A ``loss`` or ``metric`` must be the same function.
        checkpoint_every: number of steps after which the checkpoint is written as well.
        log: called after each epoch: `JsonLines`, `TensorBoard`, or any function of a `Fit`.
        progress: show a progress bar on a terminal, if rich is installed.

    Returns:
        The loss and score of each epoch.

    Raises:
        VisadaptError: the task, metric or device does not exist; the data does not fit; the checkpoint belongs to
            another training run (the message names what differs); a loss, gradient or logit is not finite, in which
            case the task keeps the state after its best epoch so far, or its initial state.

    Examples:
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> result = fit(model, "flowers", (images, labels), recipe=Recipe(epochs=2, batch_size=3))
        >>> result.steps, len(result.epochs)
        (4, 2)
        >>> result = fit(model, "flowers", (images, labels), validation=0.5, recipe=Recipe(epochs=2, batch_size=3))
        >>> result.steps, result.score is None
        (2, False)
    """
    check_backward("fit")
    recipe = Recipe() if recipe is None else recipe
    _check(recipe, validation, checkpoint, accumulate, checkpoint_every)
    augmentation = recipe.augmentation
    cached = prepare if isinstance(prepare, CachedPrefix) else None
    if cached is not None:
        cached.check(model, task)
        if augment is not None or augmentation != Augmentation():
            name = "augment=" if augment is not None else "the recipe's augmentation"
            raise VisadaptError(f"{name} cannot change what prepare= has cached: give augment= to cache_prefix instead")
        if recipe.compile is not None:
            raise VisadaptError(f"compile={recipe.compile!r} compiles whole models, and prepare= is a cached prefix")
    target = target_of(model, task)
    with target.context():  # a task that was not in use follows what was set for all
        if not any(parameter.requires_grad for parameter in target.parameters.values()):
            raise VisadaptError(
                f"a parameter of {target.name} must require a gradient: call visadapt.trainable(model, {task!r}) first"
            )
    # mixed labels are shares of classes
    training_loss = "cross_entropy" if augmentation.mixes and loss is None else loss
    objective, score_objective = Objective(training_loss, recipe.label_smoothing), Objective(loss)
    inputs = prepare if isinstance(prepare, ImageInputs) else None
    changes = Changes(augment, augmentation, inputs, target.classes, isinstance(train, ImageFiles))
    if is_real(validation):
        train, validation = held_back(train, validation, seed)
    train = training_batches(train, recipe, prepare, seed)
    batches = Batches(train, recipe.batch_size, "training", objective=objective)
    held_out = None
    if validation is not None:
        held_out = Batches(validation, max(recipe.batch_size, 100), "validation", objective=score_objective)
    check_score(metric, None if held_out is None else held_out.labels, target.classes)
    for data in filter(None, (batches, held_out)):
        if data.labels is not None and target.classes is not None:
            objective.check_labels(data.labels, target.classes, data.purpose)
    if recipe.fast and precision == "fp32":
        raise VisadaptError("precision must be 'bf16' or None with a recipe that is fast=True, got 'fp32'")
    engine = Engine(model, device, "bf16" if recipe.fast else precision, accumulate)
    if recipe.fast:
        # convolutions are fastest in this format, and so are the copies of weights that autocast makes
        channels_last(model)
    settings = {
        "recipe": recipe,
        "loss": described(loss),
        "metric": described(metric),
        "seed": seed,
        "inputs": cached.identity if cached is not None else prepare if dataclasses.is_dataclass(prepare) else None,
        "augmentation": augment is not None,
        **engine.settings,
    }
    saved = None if checkpoint is None else Checkpoint(checkpoint, identity(model, task, batches, held_out, **settings))
    origin, model = model, beside_serving(model, task, cached is not None)
    # again: a move to another device may have made new tensors
    target = target_of(model, task)
    graphs = recipe.compile == "graphs"
    logits_model = LogitsModel(model, prepare or ready, engine, recipe.fast, None if graphs else recipe.compile)
    if graphs:
        logits_model.capture(target.parameters.values())
    random = Randomness(seed, engine.device, engine.rank)
    logs = (log,) if callable(log) else tuple(log)
    title, show = task or type(model).__name__, progress and engine.rank == 0
    with keep_modes(model), random, only_trainable(model, target, engine.processes), reserved(origin, model):
        loop = Loop(logits_model, target, batches, recipe, changes, random)
        try:
            if recipe.head_first and not (saved is not None and saved.resumes):
                with bar(len(batches), title, show) as advance:
                    loop.run.head_first = start_with_head(model, task, logits_model, target, batches, seed, advance)
                if held_out is not None and not loop.run.head_first.startswith("no "):
                    loop.run.start = _score(logits_model, target, held_out, metric)
                loop.begin_again()
        except BaseException:
            target.restore(loop.kept)
            raise
        if saved is not None:
            saved.begin(loop)

        def history() -> Fit:
            run, size = loop.run, sum(p.numel() for p in target.parameters.values())
            name, epochs = metric_name(metric), tuple(run.epochs)
            return Fit(task, epochs, name, run.best, run.steps, size, run.head_first, run.start)

        def after_step() -> None:
            advance(f"loss {loop.run.loss / max(1, loop.run.seen):.3f}")
            if saved is not None and checkpoint_every is not None and loop.run.steps % checkpoint_every == 0:
                saved.write(loop)

        try:
            with bar(loop.steps, title, show, loop.run.steps) as advance:
                while not loop.finished:
                    start = time.perf_counter()
                    mean_loss = loop.epoch(after_step)
                    score = None if held_out is None else _score(logits_model, target, held_out, metric)
                    so_far = loop.run.start if not loop.run.best else history().score
                    better = score is None or _better(score, so_far, metric)
                    loop.end_epoch(
                        Epoch(len(loop.run.epochs) + 1, mean_loss, score, time.perf_counter() - start), better
                    )
                    if saved is not None:
                        saved.write(loop)
                    for write_log in logs if engine.rank == 0 else ():
                        write_log(history())
            target.restore(loop.kept)
        except VisadaptError:
            target.restore(loop.kept)
            raise
        finally:
            for parameter in target.parameters.values():
                parameter.grad = None
    return history()


def _check(recipe: Any, validation: Any, checkpoint: Any, accumulate: int, checkpoint_every: int | None) -> None:
    if not isinstance(recipe, Recipe):
        raise VisadaptError(f"recipe must be a visadapt.training.Recipe, got {type(recipe).__name__}")
    if recipe.patience is not None and validation is None:
        raise VisadaptError(f"patience={recipe.patience} needs validation data to score each epoch")
    if isinstance(validation, int | float) and (isinstance(validation, bool) or not 0 < validation < 1):
        raise VisadaptError(f"validation must be data or a fraction in (0, 1), got {validation!r}")
    check_count(accumulate, "accumulate")
    if checkpoint_every is not None:
        check_count(checkpoint_every, "checkpoint_every")
        if checkpoint is None:
            raise VisadaptError(f"checkpoint_every={checkpoint_every} needs checkpoint=, the file to write")


def _score(logits_model: LogitsModel, target: Target, data: Batches, metric: Metric) -> float:
    (score,) = scores(logits_model, target, data, (metric,)).values()
    return score


def _better(score: float, best: float | None, metric: Metric) -> bool:
    if best is None or math.isnan(best):
        return True
    return score > best if larger_is_better(metric) else score < best
