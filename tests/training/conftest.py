"""A small real problem: scikit-learn's digits, and a narrow ResNet with a task for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.models import ZOO
from visadapt.data import ImageSet, load_images


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    whole = load_images("digits", size=16)
    return ImageSet("digits", whole.classes, whole.train.subset(range(320)), whole.test.subset(range(120)))


@pytest.fixture
def injected() -> nn.Module:
    torch.manual_seed(0)
    return visadapt.inject(ZOO["tiny/resnet"].make(), m=8, task="digits", num_classes=10)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def backbone(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state(model).items() if ".visadapt." not in f".{name}"}
