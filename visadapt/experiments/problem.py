"""A problem: a backbone to adapt and the data to adapt it to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Problem:
    """What contenders are compared on.

    Args:
        name: for titles and files.
        build: makes a pretrained backbone.
        labels: the classes' names.
        train: to train on.
        validation: to choose learning rates by; no part of ``train``.
        test: for the final figures only.
        settings: everything that figures depend on and that is not said elsewhere (backbone, data, sizes), as JSON
            values: results are told apart by it.
        prepare: as :func:`visadapt.training.fit` takes it.
        augment: likewise.
    """

    name: str
    build: Callable[[], nn.Module]
    labels: tuple[str, ...]
    train: Any
    validation: Any
    test: Any
    settings: dict[str, Any]
    prepare: Callable[[Any], Any] | None = None
    augment: Callable[..., Any] | None = None

    def fresh(self) -> nn.Module:
        """A backbone as pretrained; what it may draw at random is the same each time, and the caller's draws stay."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()
