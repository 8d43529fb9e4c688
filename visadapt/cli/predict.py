"""``visadapt predict``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from torch import nn

import visadapt
from visadapt.checks import check_choice, check_count
from visadapt.cli.given import refuse_unused
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
from visadapt.cli.output import say, show
from visadapt.cli.table_options import TableOptions, with_table
from visadapt.data import image_files, read_texts
from visadapt.data.datasets_library import is_stored
from visadapt.data.image_file import SUFFIXES as IMAGES
from visadapt.data.image_tables import named_images
from visadapt.data.inputs import ImageInputs, Inputs, TextInputs
from visadapt.data.tables import OTHERWISE, is_table, read_table, read_text
from visadapt.data.text_rows import TEXT_COLUMNS
from visadapt.errors import VisadaptError
from visadapt.files import replacing
from visadapt.opening import Prediction
from visadapt.opening.predicting import problem_of, read_logits
from visadapt.printable import printable, printable_json
from visadapt.reading import check_file
from visadapt.runtime.registry import tasks
from visadapt.table import Table
from visadapt.training import predict as logits
from visadapt.training.progress import bar

FORMATS = ("jsonl", "table")


@with_table("text", "image", "header", "delimiter", "encoding")
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders of images, or tables that name images; tables of texts, or files with one text per "
            "line (- for standard input)."
        ),
    ],
    task: Annotated[list[str], typer.Option(help="Task file or hub:USER/REPO; repeatable for tasks of one backbone.")],
    table: TableOptions,
    root: Annotated[Path | None, typer.Option(help="Folder from which a table names its images.")] = None,
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
    """Predict the class of each image or text.

    Of a table (.tsv, .csv), the texts or the images that it names are taken: from the column of --text or --image, or
    the one that the task was trained on. Several tasks of one backbone can predict at once; the backbone is in memory
    only once.
    """
    check_choice(form, FORMATS, "format")
    check_count(batch_size, "--batch-size")
    if out is None:
        refuse_unused("without --out no file is written", "force")
    else:
        check_writable(out, force)
    model = visadapt.open(task, backbone=backbone, build=pairs(build, "--build"), online=online)
    prepared = {name: visadapt.preprocess(model, name, online=online).inputs for name in tasks(model)}
    seen = {isinstance(each, ImageInputs) for each in prepared.values()}
    if len(seen) > 1:
        raise VisadaptError("all tasks must take the same kind of input, got tasks for images and for texts")
    if all(problem_of(spec) == "regression" for spec in tasks(model).values()):
        refuse_unused("a regression answers with all its values", "top")
    noted = tasks(model)[next(iter(prepared))].notes.get("table")
    if seen.pop():
        refuse_unused(f"{_named(task)} images", "text")
        if not any(map(_is_data_table, inputs)):
            refuse_unused("the input has no table (.csv, .tsv)", "image", "root", "header", "delimiter", "encoding")
        names = _images(inputs, table.over(noted), root)
    else:
        refuse_unused(f"{_named(task)} texts", "image", "root")
        paired = any(each.pairs for each in prepared.values() if isinstance(each, TextInputs))
        if not any(map(_is_data_table, inputs)):
            refuse_unused("the input has no table (.csv, .tsv)", "text", "header", "delimiter")
        if all(place == "-" for place in inputs):
            refuse_unused("standard input is read in the terminal's encoding", "encoding")
        names = _texts(inputs, table.over(noted), paired)
    unread = [name for name in names if not _is_text(name)]
    for name in unread:
        say(f"warning: the name {printable(name)} is not valid text, and is shown with escapes")
    running = {"device": device, "precision": precision}
    answers = _answers(model, prepared, names, batch_size, top, running, unread.append)
    with _written(out) as file:
        if form == "jsonl":
            for answer in answers:
                print(printable_json(answer), file=file, flush=file is sys.stdout)
        else:
            rows = [(a["input"], a["task"], t["label"], f"{t['score']:.3f}") for a in answers for t in a["top"]]
            printed = Table(("input", "task", "label", "score"), rows)
            show(printed) if out is None else print(printed, file=file)
    if unread:
        raise typer.Exit(1)


def _named(files: list[str]) -> str:
    return f"{files[0]} takes" if len(files) == 1 else "these tasks take"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images(places: Sequence[str], table: TableOptions, root: Path | None) -> list[str]:
    if "-" in places:
        raise VisadaptError("- is standard input, from which only texts are read, and the task takes images")

    def files(place: str) -> Iterable[Path]:
        if _is_data_table(place):
            return named_images(Path(place), table.image, root, table.form)
        return image_files(place)

    return [str(file) for place in places for file in files(place)]


def _texts(places: Iterable[str], table: TableOptions, paired: bool) -> list[str]:
    """The texts of tables and of files with one text per line; the two texts of a pair are separated by a tab."""
    texts: list[str] = []
    for place in places:
        path = Path(place)
        if _is_data_table(place):
            texts += _column(path, table, paired)
        else:
            texts += _lines(place, table.form.encoding)
    if not texts:
        raise VisadaptError("the input has no text to predict on")
    return texts


def _is_data_table(place: str) -> bool:
    path = Path(place)
    return place != "-" and (is_stored(path) or (is_table(path) and not place.lower().endswith(".txt")))


def _column(file: Path, table: TableOptions, paired: bool) -> list[str]:
    if is_stored(file):
        refuse_unused(f"{file} is not a table as text", "header", "delimiter", "encoding")
        return _checked(read_texts(file, table.text), file, paired)
    bare = replace(table.form, header=False)
    rows = read_table(file, bare)
    usual = {name for group in TEXT_COLUMNS for name in ((group,) if isinstance(group, str) else group)}
    if table.text is None and rows.width == 1 + paired and not usual & set(rows.rows[0]):
        # no header and no other column: one text per line, or one pair
        found: list[Any] = read_texts(file, tuple(range(rows.width)), bare)
    else:
        found = read_texts(file, table.text, table.form)
    return _checked(found, file, paired)


def _checked(found: list[Any], file: Path, paired: bool) -> list[str]:
    if found and isinstance(found[0], tuple) != paired:
        takes = "pairs of texts" if paired else "single texts"
        raise VisadaptError(f"the task takes {takes}: choose the columns of {file} with --text")
    return [text if isinstance(text, str) else "\t".join(part.replace("\t", " ") for part in text) for text in found]


def _lines(place: str, encoding: str) -> list[str]:
    if place != "-" and not os.path.isfile(place):
        check_file(place, "an input", "a text file")
        raise VisadaptError(f"cannot read {place} as a text file: the file does not exist")
    suffix = Path(place).suffix.lower()
    if suffix in IMAGES or suffix in OTHERWISE:
        what = "an image" if suffix in IMAGES else "not a text file"
        raise VisadaptError(f"{place} is {what}, and the task takes texts")
    text = sys.stdin.read() if place == "-" else read_text(Path(place), encoding)
    # split as training files are: a form feed or a U+2028 is part of a text
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip()]


def _answers(
    model: nn.Module,
    tasks_: dict[str, Inputs],
    names: list[str],
    batch: int,
    top: int,
    options: dict[str, Any],
    failed: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Batch by batch, so that the images of a large folder are never all in memory.

    What cannot be read is reported and passed to ``failed``.
    """
    specs = tasks(model)
    rest = iter(names)
    with bar(-(-len(names) // batch), "predicting", True) as advance:
        while chunk := list(islice(rest, batch)):
            kept, read = _read(tasks_, chunk, failed)
            if not kept:
                continue
            found = {
                task: logits(model, task, read[task], prepare=inputs, batch_size=batch, **options)
                for task, inputs in tasks_.items()
            }
            predictions = {task: read_logits(specs[task], scores, top) for task, scores in found.items()}
            for row, name in enumerate(kept):
                for task, predicted in predictions.items():
                    yield {"input": name, "task": task, "top": _top(predicted[row])}
            advance(printable(chunk[-1])[:40])


def _read(
    tasks_: dict[str, Inputs], chunk: list[str], failed: Callable[[str], None]
) -> tuple[list[str], dict[str, Any]]:
    """The inputs of a batch for each task, and the names of those that can be read."""
    try:
        return chunk, {task: inputs.read(chunk) for task, inputs in tasks_.items()}
    except VisadaptError as error:
        if len(chunk) == 1:
            say(f"error: {error}")
            failed(chunk[0])
            return [], {}
    # one by one, to find which; then those that are left together
    kept = [name for name in chunk if _read(tasks_, [name], failed)[0]]
    return kept, {task: inputs.read(kept) for task, inputs in tasks_.items()} if kept else {}


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
