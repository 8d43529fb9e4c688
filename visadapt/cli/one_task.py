"""Open the file of one task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import visadapt
from visadapt.errors import VisadaptError
from visadapt.runtime.registry import tasks


def open_one(source: str, backbone: str | None, build: Mapping[str, Any], online: bool) -> tuple[nn.Module, str]:
    """Load the backbone of a task file, with its task; return them and the task's name.

    Raises:
        VisadaptError: ``source`` is a repository with several tasks, or cannot be opened.
    """
    model = visadapt.open(source, backbone=backbone, build=build, online=online)
    names = list(tasks(model))
    if len(names) > 1:
        raise VisadaptError(
            f"{source} has several tasks ({', '.join(names)}): name a file, as hub:USER/REPO/FILE.visadapt"
        )
    return model, names[0]
