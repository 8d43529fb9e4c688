"""Small real problems: a narrow ResNet with weights as drawn, bundled digits, a few samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from visadapt.experiments import Contender, ImageProblem
from visadapt.experiments.train import Workplace
from visadapt.methods import Bottleneck, Full, Linear, Method, Norms
from visadapt.training import Recipe

NARROW = (("pretrained", False), ("channels", (8, 16, 24, 32)))


def small(data: str = "digits", **changes: Any) -> ImageProblem:
    """A problem of a moment."""
    sizes = {"train": 64, "validation": 50, "test": 60, "size": 16, "options": NARROW}
    return ImageProblem("timm/resnet18", data, **{**sizes, **changes})


def who(method: Method | None = None, name: str = "", **recipe: Any) -> Contender:
    """A contender of one epoch."""
    method = Bottleneck(4) if method is None else method
    norms = "frozen" if isinstance(method, Linear) else "affine"
    return Contender(name or str(method), method, Recipe(**{"epochs": 1, "lr": 1e-2, **recipe}), norms)


EVERYONE = (
    who(Linear(), "linear probe"),
    who(Norms(), "norms only"),
    who(Bottleneck(4), "bottleneck m=4"),
    who(Full(), "full fine-tuning"),
)


@pytest.fixture
def problem() -> ImageProblem:
    return small()


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def stirred(model: torch.nn.Module, task: str, seed: int = 1) -> torch.nn.Module:
    """Every parameter of a task moved, as a long training would."""
    from tests.models import stir

    for again in range(4):
        stir(model, task, seed + again)
    return model.eval()
