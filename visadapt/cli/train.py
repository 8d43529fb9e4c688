"""``visadapt train``."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.given import refuse_unused
from visadapt.cli.options import (
    Build,
    Damaged,
    Device,
    Force,
    Memory,
    Method,
    MethodOption,
    Norms,
    Out,
    Precision,
    Root,
    Where,
    Width,
    check_loading,
    check_writable,
    norm_policy,
    number,
    pairs,
    parse_method,
)
from visadapt.cli.output import say, show
from visadapt.cli.quick import cached_data, quick_recipe, quick_size
from visadapt.cli.table_options import TableOptions, with_table
from visadapt.data import augment
from visadapt.data.allowlist import objections
from visadapt.data.image_layouts import LAYOUTS
from visadapt.data.image_sources import find
from visadapt.data.inputs import ImageInputs, TextInputs, check_texts, described, inputs_of
from visadapt.data.lazy_images import DAMAGED, HELD
from visadapt.data.splits import Splits
from visadapt.errors import VisadaptError
from visadapt.opening.backbones import open_backbone
from visadapt.runtime.registry import check_task_name
from visadapt.training import RECIPES, JsonLines, Recipe, fit
from visadapt.training import evaluate as measure
from visadapt.training.metrics import METRIC_OF, METRICS, check_metric


@with_table()
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
    table: TableOptions,
    task: Annotated[
        str | None, typer.Option(help="Name of the task; by default the file name without its suffix.")
    ] = None,
    method: Method = "Bottleneck",
    m: Width = None,
    option: MethodOption = None,
    norms: Norms = "auto",
    where: Where = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick/--no-quick",
            help="For a first result in minutes, choose the epochs, the patience and the bundled ResNet-50's image "
            "size by the size of the data, unless they or a recipe are given, and compute once what no site trains.",
        ),
    ] = True,
    recipe: Annotated[
        str | None, typer.Option(help=f"Training recipe: {', '.join(RECIPES)}; default: houlsby.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data; default: quick's choice.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step; default: the recipe's.")] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after this many epochs without a better score; default: quick's choice, else never."),
    ] = None,
    head_first: Annotated[
        bool | None,
        typer.Option(
            "--head-first/--no-head-first",
            help="Whether a new head starts as the linear probe; default: the recipe's choice.",
        ),
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
    mixup: Annotated[
        float | None, typer.Option(help="Mix pairs of training images: alpha of mixup, such as 0.2.")
    ] = None,
    cutmix: Annotated[
        float | None, typer.Option(help="Paste parts of training images: alpha of CutMix, such as 1.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: quick's choice, else the backbone's.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Maximum tokens per text; longer texts are truncated.")] = None,
    root: Root = None,
    damaged: Damaged = DAMAGED,
    memory: Memory = HELD / 1e9,
    online: Annotated[bool, typer.Option("--online", help="Allow downloading a data set.")] = False,
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

    The file records the labels, the name of the backbone, how inputs are prepared, the training settings and the
    scores, so predict needs nothing else. Where the data has no test split, 20 % is held out for testing, and where it
    has no validation split, 10 % to select the best epoch.
    """
    target = check_writable(out, force)
    for file, given in ((checkpoint, "--checkpoint"), (log, "--log")):
        if file is not None:
            check_writable(file, True, given)
    check_loading(seed, memory)
    if recipe is not None:
        check_choice(recipe, RECIPES, "recipe")
    if metric is not None:
        check_choice(metric, METRICS, "metric")
    overrides = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "patience": patience,
        "head_first": head_first,
        "random_crop": random_crop,
        "rand_augment": rand_augment,
        "mixup": mixup,
        "cutmix": cutmix,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    steps = RECIPES[recipe or "houlsby"].replace(**overrides)
    logs = () if log is None else (JsonLines(log),)
    adapter = parse_method(method, m, option)
    name = target.stem if task is None else task
    check_task_name(name)
    loading = pairs(build, "--build")
    model = open_backbone(backbone, loading)
    inputs = inputs_of(model, backbone, size, length)
    changed = flips_and_shifts or steps.augmentation.crops or steps.augmentation.mixes
    if isinstance(inputs, TextInputs):
        of_images = ("flips_and_shifts", "random_crop", "rand_augment", "mixup", "cutmix", "damaged")
        # quick keeps features of texts under this limit
        refuse_unused(f"{backbone} takes texts", *of_images, *(() if quick else ("memory",)))
    options = {**table.given, **({} if root is None else {"root": root}), **({"online": True} if online else {})}
    chosen: dict[str, Any] = {}

    def choose(count: int) -> None:
        if quick and recipe is None:
            made = {key: value for key, value in quick_recipe(steps, count).items() if key not in overrides}
            chosen.update(made)

    if isinstance(inputs, ImageInputs):
        found = find(data, **options)
        choose(len(found.splits.get("train", ())))
        if quick and size is None and backbone == "bundled/resnet50":
            chosen["size"] = quick_size(len(found.splits.get("train", ())), chosen.get("epochs", steps.epochs))
            inputs = dataclasses.replace(inputs, size=chosen["size"])
        splits = inputs.load(
            found,
            seed=seed,
            damaged=damaged,
            memory=int(memory * 1e9),
            training=inputs.pixels if steps.augmentation.crops else None,
        )
    else:
        check_texts(model, inputs)
        splits = inputs.load(data, seed=seed, **options)
        choose(len(splits.train))
    steps = steps.replace(**{key: value for key, value in chosen.items() if key != "size"})
    metric = metric or METRIC_OF[splits.problem_type]
    check_metric(metric, splits.train.labels, max(1, len(splits.classes)))
    if splits.problem_type == "single_label_classification" and len(present := splits.train.labels.unique()) < 2:
        one = splits.classes[int(present)]
        layouts = f"; the layouts are: {LAYOUTS}" if isinstance(inputs, ImageInputs) else ""
        raise VisadaptError(f"{data} must have at least two classes, got only {one!r} in its training samples{layouts}")
    if steps.augmentation.mixes and splits.problem_type != "single_label_classification":
        raise VisadaptError("--mixup and --cutmix need one class per image")
    for remark in splits.remarks:
        say(remark)
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
    shared: dict[str, Any] = {"device": device, "precision": precision}
    cached = None
    if quick and not changed:
        cached = cached_data(model, name, splits, device, precision, memory * 1e9)
    if quick:
        say(_described(chosen, steps, cached and cached[0].prefix.path))
    prepare, training, validation = (splits.inputs, splits.train, splits.validation) if cached is None else cached
    try:
        history = fit(
            model,
            name,
            training,
            validation,
            steps,
            prepare=prepare,
            metric=metric,
            seed=seed,
            checkpoint=checkpoint,
            augment=augment if flips_and_shifts else None,
            log=logs,
            **shared,
        )
    finally:
        if cached is not None:
            cached[0].prefix.close()
    show(history.table())
    score = measure(model, name, splits.test, (metric,), prepare=splits.inputs, **shared)[metric]
    notes = {
        "backbone": {"name": backbone, "build": loading},
        "inputs": described(splits.inputs),
        "problem_type": splits.problem_type,
        **({"table": table.given} if table.given else {}),
        "training": _settings(recipe or "houlsby", steps, chosen),
        "metrics": _scores(metric, history.score, score, splits, seed),
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


def _described(chosen: dict[str, Any], recipe: Recipe, cached: str | None) -> str:
    """The quick setting in one line."""
    parts = [f"images of {chosen['size']} pixels"] if "size" in chosen else []
    stops = recipe.patience is not None and recipe.patience < recipe.epochs
    parts.append(f"{'at most ' if stops else ''}{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}")
    if stops:
        parts.append(f"stop after {recipe.patience} without a better score")
    if recipe.head_first:
        parts.append("head first")
    if cached is not None:
        parts.append(f"up to {cached} computed once")
    return f"quick setting: {', '.join(parts)} (options override it; --no-quick for the recipe as it is)"


def _settings(name: str, recipe: Recipe, chosen: dict[str, Any]) -> dict[str, Any]:
    """The note ``training``: the recipe, in what it differs from the one of this name, and what quick chose."""
    values, plain = dataclasses.asdict(recipe), dataclasses.asdict(RECIPES[name])
    changed = {key: value for key, value in values.items() if value != plain[key]}
    return {"recipe": name, **changed, **({"quick": chosen} if chosen else {})}


def _scores(metric: str, validation: float | None, test: float, splits: Splits, seed: int) -> dict[str, Any]:
    """The note ``metrics``; see `visadapt.runtime.measured.measured`."""
    scored = {"validation": (validation, splits.validation), "test": (test, splits.test)}
    return {
        "metric": metric,
        **{
            split: {"score": score, "samples": len(samples)}
            for split, (score, samples) in scored.items()
            if score is not None and math.isfinite(score)
        },
        "seed": seed,
    }
