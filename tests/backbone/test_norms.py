"""Norms of every kind: what a task owns of them, in a mixed batch, in a file and merged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers
import torch
import torchvision
from torch import Tensor, nn

import visadapt as v
from tests.models import enliven, stir
from visadapt import VisadaptError

FROZEN = torchvision.ops.misc.FrozenBatchNorm2d

WIDTHS = (8, 16, 24, 32)


def with_prelu(width: int) -> nn.Module:
    return timm.layers.BatchNormAct2d(width, act_layer=nn.PReLU)


def tracked_instance_norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=True, track_running_stats=True)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "frozen": FROZEN,
    "group": lambda width: nn.GroupNorm(4, width),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
    "tracked instance": tracked_instance_norm,
    "layer, channels first": timm.layers.LayerNorm2d,
    "batch with PReLU": with_prelu,
    "EvoNorm B0": timm.layers.EvoNorm2dB0,
    "EvoNorm S0": lambda width: timm.layers.EvoNorm2dS0(width, groups=4),
    "filter response": timm.layers.filter_response_norm.FilterResponseNormTlu2d,
    "identity": lambda width: nn.Identity(),
}

MERGING = ("batch", "sync", "frozen")
"""Norms that a linear adapter behind them, or behind the convolution before them, merges into."""


def network(name: str) -> nn.Module:
    """torchvision's ResNet with one narrow block per stage."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    with torch.device("meta"):
        model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5, norm_layer=NORMS[name])
    model.inplanes = WIDTHS[0]
    model.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
    model.bn1 = NORMS[name](WIDTHS[0])
    for stage, width in enumerate(WIDTHS):
        setattr(model, f"layer{stage + 1}", model._make_layer(block, width, 1, stride=1 + bool(stage)))
    model.fc = nn.Linear(WIDTHS[-1], 5)
    return enliven(model).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(model: nn.Module, x: Tensor, task: str | None) -> Tensor:
    with v.using(model, task):
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("name", NORMS)
def test_a_task_starts_as_the_backbone_and_owns_its_norms(name: str, x: Tensor, tmp_path) -> None:
    model, fresh = network(name), network(name)
    with torch.no_grad():
        before = model(x)
    for task in ("a", "b"):
        v.inject(model, m=4, task=task)
        assert torch.equal(answer(model, x, task), before)
    assert all(p.requires_grad for task in ("a", "b") for p in v.parameters(model, task))
    names = [[n for n, _ in v.named_parameters(model, task) if ".norm." in n or n.startswith("norm.")] for task in "ab"]
    assert names[0] == names[1]
    assert bool(names[0]) == (name != "identity")
    model.train()
    with v.using(model, "a"):
        model(x).square().sum().backward()
    model.eval()
    gradients = [p.grad for n, p in v.named_parameters(model, "a") if n in names[0]]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    for seed, task in enumerate("ab"):
        stir(model, task, seed + 1)
    tasks = ["b", "a", None, "b"]
    with torch.no_grad(), v.using(model, tasks):
        mixed = model(x)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i], answer(model, x, task)[i], rtol=1e-4, atol=1e-5)
    v.load(fresh, v.save(model, "a", tmp_path / "a.visadapt"))
    assert torch.equal(answer(fresh, x, "a"), answer(model, x, "a"))
    assert torch.equal(answer(model, x, None), before)


@pytest.mark.parametrize("name", NORMS)
def test_a_linear_adapter_merges_or_is_refused_with_the_reason(name: str, x: Tensor) -> None:
    model = network(name).double()
    v.inject(model, v.Bottleneck(m=4, activation=None), task="a")
    stir(model, "a")
    if name in MERGING:
        merged = v.merge(model, "a", probe=x.double())
        with torch.no_grad():
            torch.testing.assert_close(merged(x.double()), answer(model, x.double(), "a"), rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(VisadaptError, match=r"bottleneck at layer1\.0\.bn2 cannot be merged"):
            v.merge(model, "a", probe=x.double())


@pytest.mark.parametrize("name", NORMS)
def test_a_task_s_norms_alone_merge(name: str, x: Tensor) -> None:
    model = network(name).double()
    v.inject(
        model,
        "Linear" if name == "identity" else "Norms",
        norms="frozen" if name == "identity" else "affine",
        task="a",
        num_classes=3,
    )
    stir(model, "a")
    merged = v.merge(model, "a", probe=x.double())
    with torch.no_grad():
        torch.testing.assert_close(merged(x.double()), answer(model, x.double(), "a"), rtol=1e-9, atol=1e-9)


def test_statistics_that_never_move_cannot_be_a_task_s_own() -> None:
    model = network("frozen")
    keys = list(model.state_dict())
    with pytest.raises(
        VisadaptError, match=r"norms=.full.*FrozenBatchNorm2d never do: pass norms=.affine. or .frozen."
    ):
        v.inject(model, m=4, norms="full")
    assert list(model.state_dict()) == keys
    v.inject(model, m=4, norms="frozen")
    assert v.summary(model)["default"].norms == 0


def test_the_backbone_s_frozen_affine_part_does_not_move(x: Tensor) -> None:
    model = network("frozen")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    v.inject(model, m=4, task="a")
    optimizer = torch.optim.SGD(v.parameters(model, "a"), 0.1)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    v.eject(model)
    assert list(model.state_dict()) == list(before)


def test_lean_and_folding_know_frozen_norms(x: Tensor) -> None:
    model = network("frozen")
    v.inject(model, v.Bottleneck(m=4, activation=None), task="a", norms="frozen")
    stir(model, "a")
    expected = answer(model, x, "a")
    folded = v.merge(model, "a", fold=True, probe=x)
    assert not [module for module in folded.modules() if isinstance(module, FROZEN)]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer(v.lean(model, example=x), x, "a"), expected, rtol=1e-4, atol=1e-4)
