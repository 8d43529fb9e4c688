"""Open task files: their backbone, with the tasks loaded into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visadapt.data.file_requests import vetted
from visadapt.data.inputs import Inputs, from_description
from visadapt.errors import VisadaptError
from visadapt.opening.backbones import open_backbone
from visadapt.runtime.registry import Source, registry_of, tasks
from visadapt.runtime.selection import activate
from visadapt.task_file import load, read


def open(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    online: bool = False,
    backbone: str | nn.Module | Callable[..., nn.Module] | None = None,
    build: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load the backbone of one or several task files, with their tasks.

    A file is data: it may name a backbone and options that are on an allowlist, and nothing else. Weights and
    tokenizers that only a file names are read from this machine unless ``online`` is set.

    Args:
        source: a task file, or several of one backbone.
        online: whether a backbone or tokenizer that only a file names may be downloaded.
        backbone: instead of the one that the first file names: a name, a builder or a module.
        build: options for the backbone's loader; they replace the file's, and are not checked against the allowlist.

    Returns:
        The backbone in eval mode. The task of the first file is active; ``visadapt.tasks(model)`` has all of them.

    Raises:
        VisadaptError: a file is not a task file, belongs to another backbone, does not record its backbone, or asks
            for something that no file may choose.

    Example:
        >>> model = visadapt.inject("timm/resnet18", task="flowers", labels=["iris", "lily"], num_classes=2,
        ...                         pretrained=False, channels=[8, 16, 24, 32])
        >>> path = visadapt.save(model, "flowers", "flowers.visadapt")
        >>> again = visadapt.open("flowers.visadapt", backbone=visadapt.eject(model))
        >>> type(again).__name__, visadapt.active(again)
        ('ResNet', 'flowers')
    """
    files = [Path(each) for each in ([source] if isinstance(source, str | os.PathLike) else source)]
    if not files:
        raise VisadaptError("source must be a task file or several, got none")
    notes = [read(file).description["notes"] for file in files]
    given = backbone if isinstance(backbone, str) else None
    prepared = [_inputs(note.get("inputs"), given, online) for note in notes]
    model, loaded_by = _backbone(files[0], notes[0].get("backbone"), backbone, build, online)
    names = [load(model, file) for file in files]
    if loaded_by is not None:
        registry_of(model).source = loaded_by
    for task, file, inputs in zip(names, files, prepared, strict=True):
        spec = tasks(model)[task]
        spec.inputs, spec.origin = inputs, str(file)
    return activate(model, names[0])


def _inputs(description: Any, backbone: str | None, online: bool) -> Inputs | None:
    # before the backbone, which takes longer to load
    return None if description is None else from_description(description, backbone=backbone, online=online)


def _backbone(
    file: Path, noted: Any, given: Any, build: Mapping[str, Any] | None, online: bool
) -> tuple[nn.Module, Source | None]:
    """The backbone in eval mode, and what it was loaded by."""
    if isinstance(given, nn.Module):
        if build:
            raise VisadaptError(f"build= applies to a backbone that is loaded, got a {type(given).__name__}")
        return given.eval(), None
    if given is not None:
        options = dict(build or {})
        return open_backbone(given, options), Source(given, options) if isinstance(given, str) else None
    name, options = _noted(file, noted)
    place, loading = vetted(str(file), name, options, build, online=online)
    return open_backbone(place, loading), Source(name, {**options, **(build or {})}, by_hand=False)


def _noted(file: Path, backbone: Any) -> tuple[str, dict[str, Any]]:
    match backbone:
        case {"name": str(name), "build": dict(build)}:
            return name, build
        case {"name": str(name), **others} if "build" not in others:
            return name, {}
    raise VisadaptError(f"{file} does not record its backbone: give it with backbone= (--backbone on the command line)")
