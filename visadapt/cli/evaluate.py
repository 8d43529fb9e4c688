"""``visadapt evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from visadapt.checks import check_choice
from visadapt.cli.models import with_tasks
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
    data: Annotated[str, typer.Argument(help="As train takes it.")],
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(OF_CLASSES)}; may be repeated.")] = None,
    split: Annotated[
        str | None, typer.Option(help=f"{', '.join(SPLITS)}; if not given, test, or all of a single file.")
    ] = None,
    text: Text = None,
    label: Label = None,
    header: Header = True,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Of splits that the data does not bring; train's for the same.")] = 0,
    batch_size: BatchSize = 100,
    device: Device = None,
    precision: Precision = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    as_json: Annotated[bool, typer.Option("--json", help="Prints one JSON object.")] = False,
) -> None:
    """Measures a task on labelled data.

    Classes are found among the task's labels by their names. A single file of texts is measured whole; of one that
    was trained on, --split test and train's --seed measure the rows that were held out.
    """
    if split is not None:
        check_choice(split, SPLITS, "split")
    metrics = metric or ["accuracy", "loss"]
    for name in metrics:
        check_choice(name, OF_CLASSES, "metric")
    model, prepared = with_tasks([task], backbone, pairs(build, "--build"), online)
    ((name, inputs),) = prepared.items()
    known, options = tasks(model)[name], columns(text, label, header, root)
    if split is None and isinstance(inputs, TextInputs):
        options["whole"] = True
    splits = inputs.load(data, seed=seed, labels=known.labels, **options)
    if isinstance(inputs, TextInputs) and "inputs" in known.notes and splits.inputs != inputs:
        takes, has = ("pairs of texts", "single ones") if inputs.pairs else ("single texts", "pairs")
        raise VisadaptError(f"task {name!r} takes {takes}, and {data} has {has}: --text says which columns they are in")
    samples = getattr(splits, split or "test")
    part = split or ("all" if splits.train is None else "test")
    found = measure(model, name, samples, metrics, prepare=inputs, batch_size=batch_size, device=device,
                    precision=precision)  # fmt: skip
    if as_json:
        print(json.dumps({"task": name, "data": data, "split": part, "samples": len(samples), **found}))
    else:
        measured = f"all {len(samples):,} samples" if part == "all" else f"{len(samples):,} {part} samples"
        rows = [(key, f"{value:.4f}") for key, value in found.items()]
        show(Table((f"{name} on {data}", measured), rows))
