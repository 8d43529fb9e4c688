"""``visadapt evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.options import (
    BatchSize,
    Build,
    Device,
    Header,
    Label,
    Online,
    OtherBackbone,
    Precision,
    Root,
    TaskFile,
    Text,
    columns,
    pairs,
)
from visadapt.cli.output import show
from visadapt.data.inputs import TextInputs
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import tasks
from visadapt.table import Table
from visadapt.training import evaluate as measure
from visadapt.training.metrics import OF_CLASSES

SPLITS = ("train", "validation", "test")


def evaluate(
    task: TaskFile,
    data: Annotated[str, typer.Argument(help="Labelled data, as for train.")],
    metric: Annotated[list[str] | None, typer.Option(help=f"Metric: {', '.join(OF_CLASSES)}; repeatable.")] = None,
    split: Annotated[
        str | None, typer.Option(help=f"Split: {', '.join(SPLITS)}; default: test, or all rows of a single file.")
    ] = None,
    text: Text = None,
    label: Label = None,
    header: Header = True,
    root: Root = None,
    seed: Annotated[
        int, typer.Option(help="Seed of splits that the data does not define; use train's seed to get the same ones.")
    ] = 0,
    batch_size: BatchSize = 100,
    device: Device = None,
    precision: Precision = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a task on labelled data.

    Classes are matched to the task's labels by name. A single file of texts is used whole; to use only the rows that
    train held out, give --split test and train's --seed.
    """
    if split is not None:
        check_choice(split, SPLITS, "split")
    metrics = metric or ["accuracy", "loss"]
    for name in metrics:
        check_choice(name, OF_CLASSES, "metric")
    model = visadapt.open(task, backbone=backbone, build=pairs(build, "--build"), online=online)
    (name,) = tasks(model)
    inputs = visadapt.preprocess(model, name, online=online).inputs
    spec, options = tasks(model)[name], columns(text, label, header, root)
    if split is None and isinstance(inputs, TextInputs):
        options["whole"] = True
    splits = inputs.load(data, seed=seed, labels=spec.labels, **options)
    if isinstance(inputs, TextInputs) and "inputs" in spec.notes and splits.inputs != inputs:
        takes, has = ("pairs of texts", "single texts") if inputs.pairs else ("single texts", "pairs")
        raise VisadaptError(f"task {name!r} takes {takes}, but {data} has {has}: choose the columns with --text")
    samples = getattr(splits, split or "test")
    part = split or ("all" if splits.train is None else "test")
    scores = measure(
        model, name, samples, metrics, prepare=inputs, batch_size=batch_size, device=device, precision=precision
    )
    if as_json:
        print(json.dumps({"task": name, "data": data, "split": part, "samples": len(samples), **scores}))
    else:
        measured = f"all {len(samples):,} samples" if part == "all" else f"{len(samples):,} {part} samples"
        rows = [(key, f"{value:.4f}") for key, value in scores.items()]
        show(Table((f"{name} on {data}", measured), rows))
