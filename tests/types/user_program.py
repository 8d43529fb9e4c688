"""A user's program with annotations, which mypy --strict and pyright check and no test runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from typing_extensions import assert_type

import visadapt


class Net(nn.Module):
    """A network of the user's own, with a member that a bare nn.Module lacks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images).relu().mean((2, 3))
        return torch.nn.functional.linear(features, self.fc.weight, self.fc.bias)


def adapted(norms: Literal["frozen", "affine", "full"]) -> Net:
    model = visadapt.inject(Net(), visadapt.Parallel(), task="a", num_classes=3, norms=norms, where="conv3x3")
    return assert_type(model, Net)


def steps(model: Net, images: Tensor, labels: Tensor) -> float:
    optimiser = torch.optim.SGD(visadapt.parameters(model, "a"), lr=0.1)
    with visadapt.using(model, "a") as active:
        assert_type(active, Net)
        loss = nn.functional.cross_entropy(active(images), labels)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()
    return loss.item()


def main(folder: Path) -> list[str | None]:
    assert_type(visadapt.inject(Net, m=4, task="built", width=16), Net)
    # torchvision's decorators hide the type of resnet18() from mypy, so it is Any before and after inject
    backbone: ResNet = visadapt.inject(resnet18(), m=4)
    assert_type(visadapt.inject(backbone, m=4), ResNet)
    assert_type(visadapt.inject(timm.create_model("resnet18"), m=4), nn.Module)
    assert_type(visadapt.inject("timm/resnet18", m=4, pretrained=False), nn.Module)
    model = assert_type(visadapt.inject(adapted("affine"), visadapt.Parallel(), task="b", num_classes=3), Net)
    steps(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert_type(visadapt.combine(model, {"a": 0.5, "b": 0.5}, into="c", how="ties"), Net)
    assert_type(visadapt.activate(model, ["a", "b"]), Net)
    assert_type(visadapt.merge(model, "a").width, int)
    path: Path = visadapt.save(model, "a", folder / "a.visadapt")
    assert_type(visadapt.eject(model).width, int)
    again: nn.Module = visadapt.open(path, backbone=model)
    found: list[visadapt.Prediction] = visadapt.predict(again, torch.randn(2, 3, 8, 8), "a", top=2)
    names: str = visadapt.load(visadapt.remove(model, "a"), path, check="shapes")
    return [prediction.label for prediction in found if prediction.task == names]
