"""``visadapt train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import visadapt
from visadapt.arguments import check_argument
from visadapt.checks import check_choice
from visadapt.cli.options import (
    Build,
    Damaged,
    Delimiter,
    Device,
    Encoding,
    Force,
    Header,
    ImageColumn,
    Label,
    Memory,
    Method,
    MethodOption,
    MultiLabel,
    Norms,
    Out,
    Precision,
    Regression,
    Root,
    Text,
    Where,
    Width,
    check_writable,
    data_options,
    memory_bytes,
    norm_policy,
    number,
    pairs,
    parse_method,
)
from visadapt.cli.output import say, show
from visadapt.data import ImageFiles, augment
from visadapt.data.allowlist import objections
from visadapt.data.augmentation import Augmentation
from visadapt.data.inputs import ImageInputs, TextInputs, check_texts, described, inputs_of
from visadapt.data.lazy_images import DAMAGED, HELD, Collate
from visadapt.errors import VisadaptError
from visadapt.opening.backbones import open_backbone
from visadapt.runtime.registry import check_task_name
from visadapt.training import RECIPES, JsonLines, fit
from visadapt.training import evaluate as measure
from visadapt.training.metrics import METRICS, check_metric

METRIC_OF = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "pearson",
}
"""The metric that selects the best epoch, by what the labels are."""


def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of images (CLASS/…, or train/CLASS/… and test/CLASS/…), .tsv or .csv file of texts or of "
            "image files, folder of such files, or name of a data set such as cifar10 or tweets."
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
    norms: Norms = "auto",
    where: Where = None,
    recipe: Annotated[str, typer.Option(help=f"Training recipe: {', '.join(RECIPES)}.")] = "houlsby",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data; default: the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step; default: the recipe's.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a better score; default: never.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help=f"Metric that selects the best epoch: {', '.join(METRICS)}; default: accuracy, for several labels per "
            "sample micro_f1, for real values pearson."
        ),
    ] = None,
    flips_and_shifts: Annotated[
        bool, typer.Option("--augment", help="Augment training images with flips and shifts.")
    ] = False,
    random_crop: Annotated[
        float | None,
        typer.Option(help="Crop training images at random: smallest area of the crop, such as 0.35 of the image."),
    ] = None,
    rand_augment: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="timm's RandAugment, such as rand-m9-mstd0.5; needs --random-crop."),
    ] = None,
    mixup: Annotated[float, typer.Option(help="Mix pairs of training images: alpha of mixup, such as 0.2.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Paste parts of training images: alpha of CutMix, such as 1.")] = 0.0,
    size: Annotated[int | None, typer.Option(help="Image side in pixels; default: the backbone's.")] = None,
    length: Annotated[int | None, typer.Option(help="Maximum tokens per text; longer texts are truncated.")] = None,
    text: Text = None,
    image: ImageColumn = None,
    label: Label = None,
    regression: Regression = False,
    multi_label: MultiLabel = None,
    header: Header = True,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    root: Root = None,
    damaged: Damaged = DAMAGED,
    memory: Memory = HELD / 1e9,
    online: Annotated[bool, typer.Option("--online", help="Allow downloading a data set of images.")] = False,
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
    Where the data has no test split, 20 % is held out for testing, and where it has no validation split, 10 % to select
    the best epoch.
    """
    target = check_writable(out, force)
    for file, given in ((checkpoint, "--checkpoint"), (log, "--log")):
        if file is not None:
            check_writable(file, True, given)
    check_choice(recipe, RECIPES, "recipe")
    if metric is not None:
        check_choice(metric, METRICS, "metric")
    overrides = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "patience": patience}
    steps = RECIPES[recipe].replace(**{name: value for name, value in overrides.items() if value is not None})
    augmentation = Augmentation(random_crop, rand_augment, mixup, cutmix)
    logs = () if log is None else (JsonLines(log),)
    adapter = parse_method(method, m, option)
    check_argument(seed, int, "--seed")
    name = target.stem if task is None else task
    check_task_name(name)
    loading = pairs(build, "--build")
    model = open_backbone(backbone, loading)
    inputs = inputs_of(model, backbone, size, length)
    if isinstance(inputs, TextInputs) and (flips_and_shifts or augmentation != Augmentation()):
        given = "--augment" if flips_and_shifts else "random changes of images"
        raise VisadaptError(f"{given} applies to images only, and {backbone} takes texts")
    if isinstance(inputs, TextInputs):
        check_texts(model, inputs)
    table = data_options(
        text=text,
        image=image,
        label=label,
        regression=regression,
        multi_label=multi_label,
        header=header,
        delimiter=delimiter,
        encoding=encoding,
    )
    options = {**table, **data_options(root=root, online=online)}
    if isinstance(inputs, ImageInputs):
        options |= {
            "damaged": damaged,
            "memory": memory_bytes(memory),
            "training": augmentation.pixels(inputs),
        }
    splits = inputs.load(data, seed=seed, **options)
    for remark in splits.remarks:
        say(remark)
    metric = metric or METRIC_OF[splits.problem_type]
    check_metric(metric, splits.train.labels, max(1, len(splits.classes)))
    if splits.problem_type == "single_label_classification" and len(present := splits.train.labels.unique()) < 2:
        one = splits.classes[int(present)]
        raise VisadaptError(f"{data} must have at least two classes, got only {one!r} in its training samples")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        visadapt.inject(
            model,
            adapter,
            task=name,
            labels=splits.classes or None,
            num_classes=len(splits.classes) or 1,
            norms=norm_policy(norms),
            where=[number(term) for term in where or ()] or None,
        )
    collate = augmentation.collate(len(splits.classes))
    if collate is not None and splits.problem_type != "single_label_classification":
        raise VisadaptError("--mixup and --cutmix need one class per image")
    shared: dict[str, Any] = {"prepare": splits.inputs, "device": device, "precision": precision}
    history = fit(
        model,
        name,
        in_batches(splits.train, steps.batch_size, seed, collate),
        in_batches(splits.validation, max(steps.batch_size, 100)),
        steps,
        loss=None if collate is None else "cross_entropy",
        metric=metric,
        seed=seed,
        checkpoint=checkpoint,
        augment=augment if flips_and_shifts else None,
        log=logs,
        **shared,
    )
    show(history.table())
    score = measure(model, name, in_batches(splits.test, 100), (metric,), **shared)[metric]
    notes = {
        "backbone": {"name": backbone, "build": loading},
        "inputs": described(splits.inputs),
        "problem_type": splits.problem_type,
        **({"table": table} if table else {}),
    }
    visadapt.save(model, name, target, notes=notes)
    by_hand = ""
    if refused := objections(backbone, loading):
        say(f"{target} cannot set {', '.join(refused)} by itself: give --backbone and --build again when using it")
        by_hand = f" --backbone {backbone}" + "".join(f" --build {option}" for option in build or ())
    say(f"{metric} on {len(splits.test):,} test samples: {score:.4f}")
    holds = f"{len(splits.classes)} classes" if splits.classes else "real values"
    say(f"{target}: {holds}, {target.stat().st_size / 1e6:.2f} MB")
    new = "new-images/" if isinstance(inputs, ImageInputs) else "new-texts.txt"
    say(f"next: visadapt predict {new} --task {target}{by_hand}")
    say(f"      visadapt evaluate {target} other-labelled-data{by_hand}")
    say(f"      visadapt export {target} --out {target.with_suffix('.onnx')}{by_hand}")


def in_batches(split: Any, batch_size: int, seed: int | None = None, collate: Collate | None = None) -> Any:
    """Return what `fit` takes of a split: images that are read when they are needed come in batches.

    Args:
        split: samples in memory, or `visadapt.data.ImageFiles`.
        batch_size: images per batch.
        seed: of the order; None for the order of the files.
        collate: makes a batch of samples; None stacks them.
    """
    if not isinstance(split, ImageFiles):
        return split
    return split.batches(batch_size, shuffle=seed is not None, seed=seed or 0, collate=collate)
