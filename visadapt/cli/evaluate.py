"""``visadapt evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from visadapt.cli.opening import with_tasks
from visadapt.cli.options import (
    BatchSize,
    Device,
    Header,
    Label,
    OtherBackbone,
    Precision,
    Root,
    TaskFile,
    Text,
    columns,
)
from visadapt.cli.showing import show
from visadapt.methods.method import check_choice
from visadapt.table import Table
from visadapt.tasks import tasks
from visadapt.training import METRICS
from visadapt.training import evaluate as measure

SPLITS = ("train", "validation", "test")


def evaluate(
    task: TaskFile,
    data: Annotated[str, typer.Argument(help="As train takes it.")],
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help=f"{', '.join(SPLITS)}.")] = "test",
    text: Text = None,
    label: Label = None,
    header: Header = True,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Of splits that the data does not bring; train's for the same.")] = 0,
    batch_size: BatchSize = 100,
    device: Device = None,
    precision: Precision = None,
    backbone: OtherBackbone = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prints one JSON object.")] = False,
) -> None:
    """Measures a task on labelled data.

    Classes are found among the task's labels by their names.
    """
    check_choice(split, SPLITS, "split")
    metrics = metric or ["accuracy", "loss"]
    for name in metrics:
        check_choice(name, METRICS, "metric")
    model, prepared = with_tasks([task], backbone)
    ((name, inputs),) = prepared.items()
    splits = inputs.load(data, seed=seed, labels=tasks(model)[name].labels, **columns(text, label, header, root))
    samples = getattr(splits, split)
    found = measure(model, name, samples, metrics, prepare=inputs, batch_size=batch_size, device=device,
                    precision=precision)  # fmt: skip
    if as_json:
        print(json.dumps({"task": name, "data": data, "split": split, "samples": len(samples), **found}))
    else:
        rows = [(key, f"{value:.4f}") for key, value in found.items()]
        show(Table((f"{name} on {data}", f"{len(samples):,} {split} samples"), rows))
