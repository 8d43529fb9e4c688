"""``visadapt train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.options import (
    Build,
    Device,
    Force,
    Header,
    Label,
    Method,
    MethodOption,
    Norms,
    Out,
    Precision,
    Root,
    Text,
    Where,
    Width,
    check_writable,
    columns,
    number,
    pairs,
    parse_method,
)
from visadapt.cli.output import say, show
from visadapt.data import augment
from visadapt.data.allowlist import objections
from visadapt.data.inputs import TextInputs, described, inputs_of
from visadapt.errors import VisadaptError
from visadapt.opening.backbones import open_backbone
from visadapt.training import RECIPES, JsonLines, fit
from visadapt.training import evaluate as measure
from visadapt.training.metrics import OF_CLASSES


def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Image folder (train/CLASS/…, test/CLASS/…), .tsv or .csv file, folder "
            "of such files, or name of a data set such as cifar10 or tweets."
        ),
    ],
    out: Out,
    backbone: Annotated[
        str, typer.Option(help="Name of the backbone: timm/resnet50, hf/bert-base-uncased, bundled/minilm, …")
    ],
    task: Annotated[
        str | None, typer.Option(help="Name of the task; by default the file name without its suffix.")
    ] = None,
    method: Method = "Bottleneck",
    m: Width = None,
    option: MethodOption = None,
    norms: Norms = "affine",
    where: Where = None,
    recipe: Annotated[str, typer.Option(help=f"Training recipe: {', '.join(RECIPES)}.")] = "houlsby",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data; default: the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step; default: the recipe's.")] = None,
    metric: Annotated[
        str, typer.Option(help=f"Metric that selects the best epoch: {', '.join(OF_CLASSES)}.")
    ] = "accuracy",
    flips_and_shifts: Annotated[
        bool, typer.Option("--augment", help="Augment training images with flips and shifts.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Image side in pixels; default: the backbone's.")] = None,
    length: Annotated[int | None, typer.Option(help="Maximum tokens per text; longer texts are truncated.")] = None,
    text: Text = None,
    label: Label = None,
    header: Header = True,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial values, the sample order and the augmentation.")] = 0,
    device: Device = None,
    precision: Precision = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint file, written after each epoch; rerun the same command to resume from it."),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Log file with one line of JSON per epoch.")] = None,
    build: Build = None,
    force: Force = False,
) -> None:
    """Train a task on images or texts and write its file.

    The file records the labels, the name of the backbone and how inputs are prepared, so predict needs nothing else.
    From a single table of texts, 10 % is held out to select the best epoch and 20 % for testing.
    """
    target = check_writable(out, force)
    check_choice(recipe, RECIPES, "recipe")
    check_choice(metric, OF_CLASSES, "metric")
    overrides = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    steps = RECIPES[recipe].replace(**{name: value for name, value in overrides.items() if value is not None})
    logs = () if log is None else (JsonLines(log),)
    adapter = parse_method(method, m, option)
    loading = pairs(build, "--build")
    model = open_backbone(backbone, loading)
    inputs = inputs_of(model, backbone, size, length)
    if flips_and_shifts and isinstance(inputs, TextInputs):
        raise VisadaptError(f"--augment applies to images only, and {backbone} takes texts")
    splits = inputs.load(data, seed=seed, **columns(text, label, header, root))
    present = splits.train.labels.unique()
    if len(present) < 2:
        one = splits.classes[int(present)]
        raise VisadaptError(f"{data} must have at least two classes, got only {one!r} in its training samples")
    name = target.stem if task is None else task
    torch.manual_seed(seed)
    visadapt.inject(
        model,
        adapter,
        task=name,
        labels=splits.classes,
        num_classes=len(splits.classes),
        norms=norms,
        where=[number(term) for term in where or ()] or None,
    )
    shared: dict[str, Any] = {"prepare": splits.inputs, "device": device, "precision": precision}
    history = fit(
        model,
        name,
        splits.train,
        splits.validation,
        steps,
        metric=metric,
        seed=seed,
        checkpoint=checkpoint,
        augment=augment if flips_and_shifts else None,
        log=logs,
        **shared,
    )
    show(history.table())
    score = measure(model, name, splits.test, (metric,), **shared)[metric]
    notes = {"backbone": {"name": backbone, "build": loading}, "inputs": described(splits.inputs)}
    visadapt.save(model, name, target, notes=notes)
    if refused := objections(backbone, loading):
        say(f"{target} cannot set {', '.join(refused)} by itself: give --backbone and --build again when using it")
    say(f"{metric} on {len(splits.test):,} test samples: {score:.4f}")
    say(f"{target}: {len(splits.classes)} classes, {target.stat().st_size / 1e6:.2f} MB")
