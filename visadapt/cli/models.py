"""Backbones by name, and with the tasks of files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visadapt.data.hub import WEIGHTLESS, resolve
from visadapt.data.inputs import Inputs, from_description, inputs_of
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import tasks
from visadapt.task_file import load, read


def opened(name: str, build: dict[str, Any]) -> nn.Module:
    """A backbone; what its loader may draw at random is the same each time."""
    _hush(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve(name, **build).eval()


def shaped(name: str, build: dict[str, Any]) -> nn.Module:
    """A backbone to look at, not to run: no weights are fetched where it can be built without."""
    return opened(name, {**WEIGHTLESS.get(name.partition("/")[0], {}), **build})


def with_tasks(files: Sequence[Path], backbone: str | None = None) -> tuple[nn.Module, dict[str, Inputs]]:
    """The backbone that task files belong to, with their tasks.

    Args:
        files: of tasks of one backbone.
        backbone: its name; None for the one that the first file remembers.

    Returns:
        The model in eval mode, and what each task takes, in the order of the files.

    Raises:
        VisadaptError: a file is none, or belongs to another backbone, or nobody says to which.
    """
    remembered = [read(file)[0]["notes"].get("backbone") for file in files]
    match {"name": backbone} if backbone else remembered[0]:
        case {"name": str(name), "build": dict(build)}:
            pass
        case {"name": str(name), **others} if "build" not in others:
            build = {}
        case _:
            raise VisadaptError(f"{files[0]} does not remember its backbone: name it by --backbone")
    model = opened(name, build)
    names = [load(model, file) for file in files]
    known = tasks(model)
    inputs = {}
    for task in names:
        described = known[task].notes.get("inputs")
        inputs[task] = inputs_of(model, name) if described is None else from_description(described)
    return model, inputs


def _hush(name: str) -> None:
    """transformers says at length that a new head is new, and draws bars of its own."""
    if name.startswith("hf/") and importlib.util.find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
