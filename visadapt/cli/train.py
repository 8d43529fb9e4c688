"""``visadapt train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.models import opened
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
    columns,
    number,
    pairs,
    unwritten,
)
from visadapt.cli.output import say, show
from visadapt.cli.putting import chosen
from visadapt.data import augment
from visadapt.data.allowlist import objections
from visadapt.data.inputs import TextInputs, described, inputs_of
from visadapt.errors import VisadaptError
from visadapt.training import RECIPES, JsonLines, fit
from visadapt.training import evaluate as measure
from visadapt.training.metrics import OF_CLASSES


def train(
    data: Annotated[str, typer.Argument(help="A folder of pictures (train/CLASS/…, test/CLASS/…), a .tsv or .csv file "
                                             "or a folder of them, or a set's name such as cifar10 or tweets.")],
    out: Out,
    backbone: Annotated[str, typer.Option(help="Such as timm/resnet50, hf/bert-base-uncased, bundled/minilm.")],
    task: Annotated[str | None, typer.Option(help="The task's name; the file's, without suffix, if not given.")] = None,
    method: Method = "Bottleneck",
    m: Width = None,
    option: MethodOption = None,
    norms: Norms = "affine",
    where: Where = None,
    recipe: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")] = "houlsby",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data; by default the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step; by default the recipe's.")] = None,
    metric: Annotated[str, typer.Option(help=f"Of the best epoch: {', '.join(OF_CLASSES)}.")] = "accuracy",
    flips_and_shifts: Annotated[bool, typer.Option("--augment", help="Mirrors and shifts training pictures.")] = False,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels; the backbone's by default.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text; longer ones are cut.")] = None,
    text: Text = None,
    label: Label = None,
    header: Header = True,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Of the new parts, the order and the augmentation.")] = 0,
    device: Device = None,
    precision: Precision = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Written after each epoch; the same command goes on from it after a stop.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="A line of JSON an epoch.")] = None,
    build: Build = None,
    force: Force = False,
) -> None:  # fmt: skip
    """Trains a task on pictures or texts, and writes its file.

    The file keeps the labels, the backbone's name and how inputs are prepared, so that predict needs nothing else. Of a
    single table of texts a tenth is held out to choose the epoch by and a fifth to test.
    """
    target = unwritten(out, force)
    check_choice(recipe, RECIPES, "recipe")
    check_choice(metric, OF_CLASSES, "metric")
    told = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    steps = RECIPES[recipe].replace(**{name: value for name, value in told.items() if value is not None})
    logs = () if log is None else (JsonLines(log),)
    adapter = chosen(method, m, option)
    loading = pairs(build, "--build")
    model = opened(backbone, loading)
    inputs = inputs_of(model, backbone, size, length)
    if flips_and_shifts and isinstance(inputs, TextInputs):
        raise VisadaptError(f"--augment mirrors and shifts pictures, and {backbone} reads texts")
    splits = inputs.load(data, seed=seed, **columns(text, label, header, root))
    present = splits.train.labels.unique()
    if len(present) < 2:
        one = splits.classes[int(present)]
        raise VisadaptError(f"all training samples of {data} are of class {one!r}; a task tells two apart or more")
    name = target.stem if task is None else task
    torch.manual_seed(seed)
    visadapt.inject(model, adapter, task=name, labels=splits.classes, num_classes=len(splits.classes), norms=norms,
                    where=[number(term) for term in where or ()] or None)  # fmt: skip
    shared: dict[str, Any] = {"prepare": splits.inputs, "device": device, "precision": precision}
    history = fit(model, name, splits.train, splits.validation, steps, metric=metric, seed=seed, checkpoint=checkpoint,
                  augment=augment if flips_and_shifts else None, log=logs, **shared)  # fmt: skip
    show(history.table())
    score = measure(model, name, splits.test, (metric,), **shared)[metric]
    notes = {"backbone": {"name": backbone, "build": loading}, "inputs": described(splits.inputs)}
    visadapt.save(model, name, target, notes=notes)
    if refused := objections(backbone, loading):
        say(f"{target} must not choose {', '.join(refused)}: what reads it will ask for --backbone and --build")
    say(f"{metric} on {len(splits.test):,} test samples: {score:.4f}")
    say(f"{target}: {len(splits.classes)} classes, {target.stat().st_size / 1e6:.2f} MB")
