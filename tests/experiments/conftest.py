"""Small real problems: a narrow ResNet with random weights, bundled digits, a few samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import stir
from visadapt.experiments import Contender, ImageProblem
from visadapt.experiments.train import Workspace
from visadapt.methods import Bottleneck, Full, Linear, Method, Norms
from visadapt.training import Recipe

NARROW = (("pretrained", False), ("channels", (8, 16, 24, 32)))


def small(data: str = "digits", **changes: Any) -> ImageProblem:
    """Build a problem that is trained in a moment."""
    sizes = {"train": 64, "validation": 50, "test": 60, "size": 16, "options": NARROW}
    return ImageProblem("timm/resnet18", data, **{**sizes, **changes})


def make_contender(method: Method | None = None, name: str = "", **recipe: Any) -> Contender:
    """Build a contender that is trained for one epoch, from a random head, which takes half the time."""
    method = Bottleneck(4) if method is None else method
    norms = "frozen" if isinstance(method, Linear) else "affine"
    return Contender(
        name or str(method), method, Recipe(**{"epochs": 1, "lr": 1e-2, "head_first": False, **recipe}), norms
    )


CONTENDERS = (
    make_contender(Linear(), "linear probe"),
    make_contender(Norms(), "norms only"),
    make_contender(Bottleneck(4), "bottleneck m=4"),
    make_contender(Full(), "full fine-tuning"),
)


@pytest.fixture
def problem() -> ImageProblem:
    return small()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def perturbed(model: torch.nn.Module, task: str, seed: int = 1) -> torch.nn.Module:
    """Change every parameter of a task, as a long training run would."""
    for repeat in range(4):
        stir(model, task, seed + repeat)
    return model.eval()
