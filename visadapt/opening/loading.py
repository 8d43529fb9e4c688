"""Open task files: their backbone, with the tasks loaded into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visadapt.arguments import takes
from visadapt.data.file_requests import vetted
from visadapt.data.inputs import Inputs, from_description
from visadapt.errors import VisadaptError, option
from visadapt.opening.backbones import open_backbone, recorded_backbone
from visadapt.opening.repository import located
from visadapt.runtime.registry import Source, registry_of, tasks
from visadapt.runtime.selection import activate
from visadapt.task_file import load, read


@takes()
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

    A repository of the Hugging Face hub that the caller names is downloaded, if it is not in huggingface_hub's cache;
    the commit and the digest of each of its files are printed to standard error. ``@revision`` pins a commit, tag or
    branch: a commit in the cache needs no network.

    Args:
        source: a task file, or several of one backbone; or a repository, ``"user/repo"`` or
            ``"hub:user/repo/flowers.visadapt@revision"``, where ``hub:``, the file (by default all task files) and the
            revision may be left out.
        online: whether a backbone or tokenizer that only a file names may be downloaded.
        backbone: instead of the one that the first file names: a name, a builder or a module.
        build: options for the backbone's loader; they replace the file's, and are not checked against the allowlist.

    Returns:
        The backbone in eval mode. The task of the first file is active; ``visadapt.tasks(model)`` has all of them.

    Raises:
        VisadaptError: a file or repository does not exist; a file is not a task file, belongs to another backbone,
            does not record its backbone, or asks for something that no file may choose.

    Examples:
        >>> model = visadapt.inject("timm/resnet18", task="flowers", labels=["iris", "lily"], num_classes=2,
        ...                         pretrained=False, channels=[8, 16, 24, 32])
        >>> path = visadapt.save(model, "flowers", "flowers.visadapt")
        >>> again = visadapt.open("flowers.visadapt", backbone=visadapt.eject(model))
        >>> type(again).__name__, visadapt.active(again)
        ('ResNet', 'flowers')
    """
    found = located(source)
    files = [each.path for each in found]
    contents = [read(file) for file in files]
    for each, content in zip(found, contents, strict=True):
        if each.commit is not None:
            # what was opened can be named again: by its commit, and by its digest
            print(f"{each.origin}: digest {content.digest}", file=sys.stderr)
    notes = [content.description["notes"] for content in contents]
    given = backbone if isinstance(backbone, str) else None
    prepared = [_inputs(note.get("inputs"), given, online) for note in notes]
    model, loaded_by = _backbone(files[0], notes[0], backbone, build, online)
    names = [load(model, file) for file in files]
    if loaded_by is not None:
        registry_of(model).source = loaded_by
    for task, each, inputs in zip(names, found, prepared, strict=True):
        spec = tasks(model)[task]
        spec.inputs, spec.origin = inputs, each.origin
    return activate(model, names[0])


def _inputs(description: Any, backbone: str | None, online: bool) -> Inputs | None:
    # before the backbone, which takes longer to load
    return None if description is None else from_description(description, backbone=backbone, online=online)


def _backbone(
    file: Path, notes: Mapping[str, Any], given: Any, build: Mapping[str, Any] | None, online: bool
) -> tuple[nn.Module, Source | None]:
    """The backbone in eval mode, and what it was loaded by."""
    if isinstance(given, nn.Module):
        if build:
            raise VisadaptError(
                f"build= must be left out beside a module as the backbone, got a {type(given).__name__}"
            )
        return given.eval(), None
    if given is not None:
        options = dict(build or {})
        return open_backbone(given, options), Source(given, options) if isinstance(given, str) else None
    recorded = recorded_backbone(notes)
    if recorded is None:
        raise VisadaptError(f"{file} does not record its backbone: give it with {option('backbone')}")
    name, options = recorded
    place, loading = vetted(str(file), name, options, build, online=online)
    return open_backbone(place, loading), Source(name, {**options, **(build or {})}, by_hand=False)
