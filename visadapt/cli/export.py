"""``visadapt export``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import visadapt
from visadapt.cli.models import with_tasks
from visadapt.cli.options import Build, Force, Online, OtherBackbone, Out, TaskFile, pairs, unwritten
from visadapt.cli.output import say
from visadapt.data.inputs import ImageInputs
from visadapt.errors import VisadaptError
from visadapt.export.program import FORMATS
from visadapt.export.program import export as write
from visadapt.runtime.registry import tasks


def export(
    task: TaskFile,
    out: Out,
    merged: Annotated[bool, typer.Option("--merge", help="Merges the task into the weights first.")] = False,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    force: Force = False,
) -> None:
    """Writes a network as ONNX or torch.export program.

    By the suffix, ….onnx or ….pt2; for batches of any size. Its input is what the backbone takes: normalised pictures,
    or tokens and their mask.
    """
    target = unwritten(out, force)
    if target.suffix not in FORMATS:
        raise VisadaptError(f"{target} would be exported as {' or '.join(FORMATS)}, by its suffix")
    model, prepared = with_tasks([task], backbone, pairs(build, "--build"), online)
    ((name, inputs),) = prepared.items()
    example = inputs(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)) if isinstance(inputs, ImageInputs) else None
    labels = tasks(model)[name].labels
    if merged:
        write(visadapt.merge(model, name), target, example=example, labels=labels)
    else:
        write(model, target, task=name, example=example, labels=labels)
    say(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
