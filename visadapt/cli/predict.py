"""``visadapt predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from torch import nn

import visadapt
from visadapt.checks import check_choice
from visadapt.cli.options import (
    BatchSize,
    Build,
    Device,
    Force,
    Online,
    OtherBackbone,
    Precision,
    check_writable,
    pairs,
)
from visadapt.cli.output import show
from visadapt.data import image_files
from visadapt.data.inputs import ImageInputs, Inputs
from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.opening import Prediction
from visadapt.opening.predicting import read_logits
from visadapt.runtime.registry import tasks
from visadapt.table import Table
from visadapt.training import predict as logits
from visadapt.training.progress import bar

FORMATS = ("jsonl", "table")


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Image files and folders, or text files with one text per line (- for standard input)."),
    ],
    task: Annotated[list[Path], typer.Option(help="Task file; repeatable for tasks of one backbone.")],
    top: Annotated[int, typer.Option(min=1, help="Labels to print per input, most likely first.")] = 1,
    form: Annotated[str, typer.Option("--format", help=f"Output format: {' or '.join(FORMATS)}.")] = "jsonl",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write to this file instead of standard output.")
    ] = None,
    batch_size: BatchSize = 100,
    device: Device = None,
    precision: Precision = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    force: Force = False,
) -> None:
    """Predict the class of each image or line of text.

    Several tasks of one backbone can predict at once; the backbone is in memory only once.
    """
    check_choice(form, FORMATS, "format")
    if out is not None:
        check_writable(out, force)
    model = visadapt.open(task, backbone=backbone, build=pairs(build, "--build"), online=online)
    prepared = {name: visadapt.preprocess(model, name, online=online).inputs for name in tasks(model)}
    seen = {isinstance(each, ImageInputs) for each in prepared.values()}
    if len(seen) > 1:
        raise VisadaptError("all tasks must take the same kind of input, got tasks for images and for texts")
    names = _images(inputs) if seen.pop() else _lines(inputs)
    answers = _answers(model, prepared, names, batch_size, top, {"device": device, "precision": precision})
    with _written(out) as file:
        if form == "jsonl":
            for answer in answers:
                print(json.dumps(answer, ensure_ascii=False), file=file, flush=file is sys.stdout)
        else:
            rows = [(a["input"], a["task"], t["label"], f"{t['score']:.3f}") for a in answers for t in a["top"]]
            table = Table(("input", "task", "label", "score"), rows)
            show(table) if out is None else print(table, file=file)


def _images(places: Iterable[str]) -> list[str]:
    return [str(file) for place in places for file in image_files(place)]


def _lines(places: Iterable[str]) -> list[str]:
    lines: list[str] = []
    for place in places:
        try:
            text = sys.stdin.read() if place == "-" else Path(place).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise VisadaptError(f"cannot read {place} as a text file: {error}") from error
        # split as training files are: a form feed or a U+2028 is part of a text
        lines += [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    if not lines:
        raise VisadaptError("the input has no text to predict on")
    return lines


def _answers(
    model: nn.Module, tasks_: dict[str, Inputs], names: list[str], batch: int, top: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Batch by batch, so that the images of a large folder are never all in memory."""
    specs = tasks(model)
    rest = iter(names)
    with bar(-(-len(names) // batch), "predicting", True) as advance:
        while chunk := list(islice(rest, batch)):
            found = {
                task: logits(model, task, inputs.read(chunk), prepare=inputs, batch_size=batch, **options)
                for task, inputs in tasks_.items()
            }
            predictions = {task: read_logits(specs[task], scores, top) for task, scores in found.items()}
            for row, name in enumerate(chunk):
                for task, predicted in predictions.items():
                    yield {"input": name, "task": task, "top": _top(predicted[row])}
            advance(chunk[-1][:40])


def _top(prediction: Prediction) -> list[dict[str, Any]]:
    scores = prediction.values or prediction.probabilities
    return [{"label": name, "score": round(score, 4)} for name, score in zip(prediction.labels, scores, strict=True)]


@contextmanager
def _written(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
