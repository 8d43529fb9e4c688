"""The core on a device: ``VISADAPT_TEST_DEVICE=cuda pytest tests/test_device.py``; by default on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.models import ZOO
from visadapt.training import Recipe, evaluate, fit, predict

NAMES = ("tiny/resnet", "tiny/vgg_bn", "torchvision/resnet18", "transformers/bert")


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone and its inputs on the device."""
    member = ZOO[request.param]
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in member.inputs().items()}
    return member.make().to(device), inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**inputs)
    out = getattr(out, "logits", out)
    return out if isinstance(out, Tensor) else out[0]


def close(found: Tensor, expected: Tensor, device: torch.device) -> None:
    # convolutions of an accelerator may sum in another order, in tf32
    tolerance = 1e-4 if device.type == "cpu" else 2e-2
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def moved(model: nn.Module, task: str) -> nn.Module:
    """Change everything that a task trains a little."""
    with torch.no_grad():
        for parameter in visadapt.parameters(model, task):
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def test_inject_is_the_identity_and_its_parts_are_on_the_device(place: Any, device: torch.device) -> None:
    model, inputs = place
    before = logits(model, inputs)
    visadapt.inject(model, m=4, task="a")
    close(logits(model, inputs), before, device)
    assert {p.device.type for p in visadapt.parameters(model, "a")} == {device.type}
    model.train()
    out = model(**inputs)
    out = getattr(out, "logits", out)
    out.float().square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in visadapt.parameters(model, "a"))


def test_a_mixed_batch_equals_one_task_at_a_time(place: Any, device: torch.device) -> None:
    model, inputs = place
    for task, classes in (("a", 3), ("b", 3)):
        moved(visadapt.inject(model, m=4, task=task, num_classes=classes), task)
    rows = len(next(iter(inputs.values())))
    names = (["a", "b"] * rows)[:rows]
    alone = {}
    for task in ("a", "b"):
        with visadapt.using(model, task):
            alone[task] = logits(model, inputs)
    with visadapt.using(model, names):
        mixed = logits(model, inputs)
    close(mixed, torch.stack([alone[task][i] for i, task in enumerate(names)]), device)


def test_lean_training_gives_the_same_gradients(place: Any, device: torch.device) -> None:
    model, inputs = place
    moved(visadapt.inject(model, m=4, task="a", num_classes=3), "a")

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model.eval()(**inputs)
        getattr(out, "logits", out).float().square().sum().backward()
        return [p.grad.clone() for p in visadapt.parameters(model, "a") if p.grad is not None]

    expected = gradients()
    visadapt.lean(model)
    for found, other in zip(gradients(), expected, strict=True):
        close(found, other, device)


def test_merging_gives_the_same_outputs(place: Any, device: torch.device) -> None:
    model, inputs = place
    moved(visadapt.inject(model, visadapt.LoRA(r=2), task="a", num_classes=3), "a")
    expected = logits(model, inputs)
    plain = visadapt.merge(model, "a")
    assert {p.device.type for p in plain.parameters()} == {device.type}
    close(logits(plain, inputs), expected, device)


def test_save_and_load_give_the_same_outputs(place: Any, device: torch.device, tmp_path: Path) -> None:
    model, inputs = place
    moved(visadapt.inject(model, m=4, task="a", num_classes=3), "a")
    expected = logits(model, inputs)
    visadapt.save(model, "a", tmp_path / "a.visadapt")
    visadapt.remove(model, "a")
    visadapt.load(model, tmp_path / "a.visadapt")
    assert {p.device.type for p in visadapt.parameters(model, "a")} == {device.type}
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("options", [{}, {"fast": True}], ids=["fp32", "fast"])
def test_fit_learns_resumes_and_scores(device: torch.device, tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    recipe = Recipe(epochs=8, lr=3e-2, batch_size=16, **options)

    def run(file: Path | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = visadapt.inject(ZOO["tiny/resnet"].make(), m=4, task="a", num_classes=2)
        return model, fit(model, "a", (x, y), (x, y), recipe, device=device, checkpoint=file)

    model, result = run(tmp_path / "a.checkpoint")
    assert result.head_first.startswith("linear probe")
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert result.score is not None
    assert result.start is not None
    assert result.score >= result.start > 0.6
    assert run(tmp_path / "a.checkpoint")[1] == result
    precision = "bf16" if options else None
    assert evaluate(model, "a", (x, y), ("accuracy",), precision=precision)["accuracy"] == pytest.approx(
        result.score, abs=0 if device.type == "cpu" else 0.05
    )
    assert predict(model, "a", x).device.type == "cpu"
