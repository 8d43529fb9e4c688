"""Load backbones by name, and backbones with the tasks of files."""

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


def open_backbone(name: str, build: dict[str, Any]) -> nn.Module:
    """Load a backbone in eval mode; random initial values are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve(name, **build).eval()


def build_backbone(name: str, build: dict[str, Any]) -> nn.Module:
    """Build a backbone whose shapes are of interest only: without downloading weights where that is possible."""
    return open_backbone(name, {**WEIGHTLESS.get(name.partition("/")[0], {}), **build})


def with_tasks(
    files: Sequence[Path], backbone: str | None = None, build: Mapping[str, Any] | None = None, online: bool = False
) -> tuple[nn.Module, dict[str, Inputs]]:
    """Load the backbone of some task files, and their tasks into it.

    Files are data: of the options they note, only those listed in :mod:`visadapt.data.allowlist` are used.

    Args:
        files: task files of one backbone.
        backbone: name of the backbone; None for the one that the first file records.
        build: options for its loader given by the user; they replace those of the file.
        online: whether a backbone or tokenizer that only a file names may be downloaded.

    Returns:
        The model in eval mode, and the inputs of each task, in the order of the files.

    Raises:
        VisadaptError: a file is not a task file, belongs to another backbone or does not record its backbone, or asks
            for something that no file may choose.
    """
    notes = [read(file).description["notes"] for file in files]
    if backbone is None:
        name, noted = _noted(files[0], notes[0].get("backbone"))
        source, loading = vetted(str(files[0]), name, noted, build, online=online)
    else:
        name, source, loading = backbone, backbone, dict(build or {})

    def inputs(description: Any) -> Inputs:
        return from_description(description, backbone=backbone, online=online)

    # first, because loading the backbone takes longer
    prepared = [None if each.get("inputs") is None else inputs(each["inputs"]) for each in notes]
    model = open_backbone(source, loading)
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
    raise VisadaptError(f"{file} does not record its backbone: give it with --backbone")
