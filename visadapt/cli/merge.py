"""``visadapt merge``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import visadapt
from visadapt.cli.one_task import open_one
from visadapt.cli.options import Build, Force, Online, OtherBackbone, Out, TaskFile, check_writable, pairs
from visadapt.cli.output import say
from visadapt.runtime.registry import tasks
from visadapt.tensor_file import write_tensors


def merge(
    task: TaskFile,
    out: Out,
    fold: Annotated[bool, typer.Option("--fold", help="Fold every BatchNorm into the convolution before it.")] = False,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
    force: Force = False,
) -> None:
    """Merge a task into the weights of a plain network.

    Writes a safetensors file with the backbone's own keys, or says why the task cannot be merged exactly.
    """
    target = check_writable(out, force)
    model, name = open_one(task, backbone, pairs(build, "--build"), online)
    plain = visadapt.merge(model, name, fold=fold)
    labels = tasks(model)[name].labels
    weights = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in plain.state_dict().items()}
    write_tensors(target, weights, {} if labels is None else {"labels": json.dumps(labels)})
    say(f"{target}: the state_dict of a {type(plain).__name__}, {target.stat().st_size / 1e6:.2f} MB")
