"""Load backbones by name, the same each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from visadapt.data.hub import WEIGHTLESS, resolve


def open_backbone(name: Any, build: dict[str, Any]) -> nn.Module:
    """Load a backbone in eval mode; random initial values are the same each time.

    Args:
        name: a name or a builder, as `visadapt.inject` takes it.
        build: options for its loader.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resolve(name, **build).eval()


def build_backbone(name: str, build: dict[str, Any]) -> nn.Module:
    """Build a backbone whose shapes are of interest only: without downloading weights where that is possible."""
    return open_backbone(name, {**WEIGHTLESS.get(name.partition("/")[0], {}), **build})


def recorded_backbone(notes: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the backbone that the notes of a task record; None if they record none in that form."""
    match notes.get("backbone"):
        case {"name": str(name), "build": dict(build)}:
            return name, build
        case {"name": str(name), **others} if "build" not in others:
            return name, {}
    return None
