"""Backbones by name, and with the tasks of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visadapt.data.file_requests import vetted
from visadapt.data.hub import WEIGHTLESS, resolve
from visadapt.data.inputs import Inputs, described, from_description, inputs_of
from visadapt.errors import VisadaptError
from visadapt.task_file import load, read


def opened(name: str, build: dict[str, Any]) -> nn.Module:
    """A backbone; what its loader may draw at random is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve(name, **build).eval()


def shaped(name: str, build: dict[str, Any]) -> nn.Module:
    """A backbone to look at, not to run: no weights are fetched where it can be built without."""
    return opened(name, {**WEIGHTLESS.get(name.partition("/")[0], {}), **build})


def with_tasks(
    files: Sequence[Path], backbone: str | None = None, build: Mapping[str, Any] | None = None, online: bool = False
) -> tuple[nn.Module, dict[str, Inputs]]:
    """The backbone that task files belong to, with their tasks.

    Files are data: of what they note, only what :mod:`visadapt.data.allowlist` lists is done.

    Args:
        files: of tasks of one backbone.
        backbone: its name; None for the one that the first file remembers.
        build: options for its loader that the user gives; they replace those of the file.
        online: whether a backbone or tokenizer that only a file names may be downloaded.

    Returns:
        The model in eval mode, and what each task takes, in the order of the files.

    Raises:
        VisadaptError: a file is not a task file, or belongs to another backbone, or does not say to which; it asks for
            what no file may choose.
    """
    notes = [read(file)[0]["notes"] for file in files]
    if backbone is None:
        name, noted = _noted(files[0], notes[0].get("backbone"))
        source, loading = vetted(str(files[0]), name, noted, build, online=online)
    else:
        name, source, loading = backbone, backbone, dict(build or {})

    def inputs(description: Any) -> Inputs:
        return from_description(description, backbone=backbone, online=online)

    # before the backbone is loaded, which takes longer
    prepared = [None if each.get("inputs") is None else inputs(each["inputs"]) for each in notes]
    model = opened(source, loading)
    names = [load(model, file) for file in files]
    return model, {
        task: inputs(described(inputs_of(model, name))) if found is None else found
        for task, found in zip(names, prepared, strict=True)
    }


def _noted(file: Path, backbone: Any) -> tuple[str, dict[str, Any]]:
    match backbone:
        case {"name": str(name), "build": dict(build)}:
            return name, build
        case {"name": str(name), **others} if "build" not in others:
            return name, {}
    raise VisadaptError(f"{file} does not remember its backbone: name it by --backbone")
