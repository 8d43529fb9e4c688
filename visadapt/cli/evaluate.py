"""``visadapt evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.given import refuse_unused
from visadapt.cli.one_task import open_one
from visadapt.cli.options import (
    BatchSize,
    Build,
    Damaged,
    Device,
    Memory,
    Online,
    OtherBackbone,
    Precision,
    Root,
    TaskFile,
    check_loading,
    pairs,
)
from visadapt.cli.output import show
from visadapt.cli.table_options import TableOptions, with_table
from visadapt.data.inputs import ImageInputs, TextInputs
from visadapt.data.lazy_images import DAMAGED, HELD
from visadapt.errors import VisadaptError
from visadapt.opening.predicting import problem_of
from visadapt.runtime.measured import seed_of
from visadapt.runtime.registry import tasks
from visadapt.table import Table
from visadapt.training import evaluate as measure
from visadapt.training.metrics import METRIC_OF, METRICS

SPLITS = ("train", "validation", "test")


@with_table("text", "image", "label", "header", "delimiter", "encoding")
def evaluate(
    task: TaskFile,
    data: Annotated[str, typer.Argument(help="Labelled data, as for train.")],
    table: TableOptions,
    metric: Annotated[list[str] | None, typer.Option(help=f"Metric: {', '.join(METRICS)}; repeatable.")] = None,
    split: Annotated[
        str | None, typer.Option(help=f"Split: {', '.join(SPLITS)}; default: test, or all rows of a single file.")
    ] = None,
    root: Root = None,
    damaged: Damaged = DAMAGED,
    memory: Memory = HELD / 1e9,
    seed: Annotated[
        int | None, typer.Option(help="Seed of splits that the data does not define; default: that of train.")
    ] = None,
    batch_size: BatchSize = 100,
    device: Device = None,
    precision: Precision = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a task on labelled data.

    Classes are matched to the task's labels by name. Data without a test split is used whole; to use only the samples
    that train held out, give --split test. A table is read as train read its own.
    """
    check_loading(seed or 0, memory)
    if split is None:
        refuse_unused("without --split no samples are held out", "seed")
    else:
        check_choice(split, SPLITS, "split")
    for name in metric or ():
        check_choice(name, METRICS, "metric")
    model, name = open_one(task, backbone, pairs(build, "--build"), online)
    inputs = visadapt.preprocess(model, name, online=online).inputs
    spec = tasks(model)[name]
    metrics = metric or [METRIC_OF.get(problem_of(spec), "accuracy"), "loss"]
    seed = seed_of(spec.notes) if seed is None else seed
    noted = TableOptions().over(spec.notes.get("table")).given
    options = table.given
    if root is not None:
        options["root"] = root
    if online:
        options["online"] = True
    if isinstance(inputs, ImageInputs):
        options |= {"damaged": damaged, "memory": int(memory * 1e9)}
    else:
        refuse_unused(f"{task} takes texts", "damaged", "memory")
    splits = inputs.load(data, seed=seed, labels=spec.labels, whole=split is None, noted=noted, **options)
    if isinstance(inputs, TextInputs) and "inputs" in spec.notes and splits.inputs != inputs:
        takes, has = ("pairs of texts", "single texts") if inputs.pairs else ("single texts", "pairs")
        raise VisadaptError(f"task {name!r} takes {takes}, but {data} has {has}: choose the columns with --text")
    samples = getattr(splits, split or "test")
    if split is not None and samples is None:
        raise VisadaptError(f"{data} has no {split} samples")
    part = split or ("all" if splits.train is None else "test")
    scores = measure(
        model,
        name,
        samples,
        metrics,
        prepare=inputs,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    if as_json:
        print(json.dumps({"task": name, "data": data, "split": part, "samples": len(samples), **scores}))
    else:
        measured = f"all {len(samples):,} samples" if part == "all" else f"{len(samples):,} {part} samples"
        rows = [(key, f"{value:.4f}") for key, value in scores.items()]
        show(Table((f"{name} on {data}", measured), rows))
