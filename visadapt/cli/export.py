"""``visadapt export``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import visadapt
from visadapt.cli.one_task import open_one
from visadapt.cli.options import Build, Force, Online, OtherBackbone, Out, TaskFile, check_writable, pairs
from visadapt.cli.output import say
from visadapt.data.inputs import ImageInputs
from visadapt.errors import VisadaptError
from visadapt.export.program import FORMATS
from visadapt.export.program import export as write
from visadapt.runtime.registry import tasks


def export(
    task: TaskFile,
    out: Out,
    merged: Annotated[bool, typer.Option("--merge", help="Merge the task into the weights first.")] = False,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    force: Force = False,
) -> None:
    """Export a network as an ONNX file or a torch.export program.

    The suffix of --out selects the format: .onnx or .pt2. The batch size stays free. The network takes what the
    backbone takes: normalised images, or token ids and their mask.
    """
    target = check_writable(out, force)
    if target.suffix not in FORMATS:
        raise VisadaptError(f"--out must end in {' or '.join(FORMATS)}, got {target}")
    model, name = open_one(task, backbone, pairs(build, "--build"), online)
    inputs = visadapt.preprocess(model, name, online=online).inputs
    example = inputs(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)) if isinstance(inputs, ImageInputs) else None
    labels = tasks(model)[name].labels
    if merged:
        write(visadapt.merge(model, name), target, example=example, labels=labels)
    else:
        write(model, target, task=name, example=example, labels=labels)
    say(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
