"""Modules that run, count, slice or list their children never meet the parts of tasks among them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torchvision
from torch import Tensor, nn

import visadapt
from tests.models import enliven, stir
from tests.versions import compiled_whole
from visadapt import using
from visadapt.methods.method import Method


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


class ByChildren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = torch.relu(child(x))
        return x


class ByNames(ByChildren):
    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():
            x = x + len(name) * child(x)
        return x


class ByDict(ByChildren):
    def forward(self, x: Tensor) -> Tensor:
        return self.through(x) / len(self._modules)

    def through(self, x: Tensor) -> Tensor:
        for child in self._modules.values():
            x = torch.relu(child(x))
        return x


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for i, child in enumerate(self):
            x = torch.relu(child(x)) + i
        return self[-1](x) / len(self)


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        outs = [module(x) for module in self.values()]
        outs += [self[name](x) for name in self]
        outs += [len(name) * module(x) for name, module in self.items()]
        return torch.stack(outs).sum(0) / len(self) + len(list(self.keys()))


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = module(x)
        return x


BLOCKS = {
    "children": ByChildren,
    "named_children": ByNames,
    "_modules": ByDict,
    "ModuleList": lambda: Listed([conv(), conv()]),
    "ModuleDict": lambda: Named({"one": conv(), "three": conv()}),
    "Sequential": lambda: nn.Sequential(conv(), nn.ReLU(), conv()),
    "own loop": lambda: Own(conv(), nn.ReLU(), conv()),
}


class Scaled(nn.Module):
    role = "after"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.scale * y


@dataclass(frozen=True)
class At(Method):
    """A part at the block itself, whatever sites there are in it."""

    kinds: ClassVar[tuple[str, ...]] = ()
    paths: tuple[str, ...] = ("1",)

    def parts(self, backbone, sites, task):
        return [(path, Scaled()) for path in self.paths]


X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=BLOCKS)
def plain(request) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), BLOCKS[request.param](), nn.Conv2d(4, 4, 1)).eval()


def test_parts_are_not_among_the_children(plain) -> None:
    expected = plain(X)
    model = copy.deepcopy(plain)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, At(), task=task, norms="frozen")
        assert torch.equal(model(X), expected)
        stir(model, task, seed)
    alone = {}
    for task in "ab":
        with using(model, task):
            alone[task] = model(X)
        assert not torch.allclose(alone[task], expected)
    with using(model, None):
        assert torch.equal(model(X), expected)
    with using(model, ["a", None, "b"]):
        found = model(X)
    for row, one in enumerate((alone["a"], expected, alone["b"])):
        torch.testing.assert_close(found[row], one[row])
    copied = copy.deepcopy(model)
    with using(copied, "a"):
        assert torch.equal(copied(X), alone["a"])
        compiled = compiled_whole(copied, backend="eager")
        assert torch.equal(compiled(X), alone["a"])
    # what goes through all modules still finds the parts
    assert {t.dtype for t in copied.double().state_dict().values()} == {torch.float64}
    assert all(p.dtype == torch.float64 for p in visadapt.parameters(copied, "a"))
    visadapt.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", ["Sequential", "ModuleList", "ModuleDict"])
def test_containers_count_and_slice_their_layers(name) -> None:
    block: nn.Module = BLOCKS[name]()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), block)
    before = list(block)
    visadapt.inject(model, At(), norms="frozen")
    assert (len(block), list(block)) == (len(before), before)
    if name == "ModuleDict":
        assert "visadapt" not in block
        assert [*block.keys()] == before
        return
    assert block[-1] is before[-1]
    assert list(block[:-1]) == before[:-1]
    assert list(block[1:]) == before[1:]
    assert type(block[:-1]) is (nn.Sequential if name == "Sequential" else Listed)
    block.append(last := conv())
    assert list(block) == [*before, last]
    assert block[-1] is last


def test_a_dense_block_and_a_getter_of_layers() -> None:
    """torchvision's DenseNet and segmentation models run modules that are dicts."""
    net = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    model = enliven(net).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    blocks = ("features.denseblock1", "features.denseblock2", "features")
    visadapt.inject(model, At(blocks), norms="frozen", head="frozen")
    assert torch.equal(model(x), expected)
    stir(model, "default")
    assert not torch.allclose(model(x), expected)
    getter = torchvision.models._utils.IntermediateLayerGetter(model.features, {"denseblock1": "a", "denseblock2": "b"})
    assert list(getter) == [name for name in net.features._modules if name not in ("norm5", "visadapt")]
    assert getter(x)["b"].shape[0] == 2


class InTurn(nn.Module):
    """Runs the children of its blocks, as checkpointing of a sequence does, without calling the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(2))
        self.fc = nn.Linear(4, 3)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = x
            for child in block.children() if self.apart else [block]:
                y = child(y)
            x = x + y
        return self.fc(x.mean((2, 3)))


def test_parts_act_where_a_hosts_children_are_run_in_turn() -> None:
    model, x = enliven(InTurn()).eval(), torch.randn(4, 4, 6, 6)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=2, task=task, where=["blocks.0", "blocks.1"], example=x)
        stir(model, task, seed)
    expected = {}
    with torch.no_grad():
        for apart in (False, True):
            model.apart = apart
            for task in ("a", None, "b", ("b", "a", "b", None)):
                with using(model, list(task) if isinstance(task, tuple) else task):
                    out = model(x)
                torch.testing.assert_close(out, expected.setdefault(task, out), rtol=1e-5, atol=1e-6)
        assert not torch.equal(expected["a"], expected["b"])
        visadapt.inject(model, m=2, task="c", train_also=("blocks.0",), example=x)
        with pytest.raises(visadapt.VisadaptError, match=r"children of blocks\.0 were run one after the other"):
            model(x)
