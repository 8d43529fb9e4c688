"""CoLoRA: its formula, on which blocks it stands, and merging."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.methods.families import CONVOLUTIONAL, FAMILIES, mixed_equals_alone
from tests.models import ZOO, answer, output, step, stir
from tests.versions import compiled_whole
from visadapt import CoLoRA, VisadaptError
from visadapt.methods.edge_filter import edge_preserving
from visadapt.runtime.registry import registry_of

STANDS = ("timm/convnext", "torchvision/convnext", "tiny/bottleneck-resnet")
PAIRS = {
    "timm/convnext": ("stages.2.blocks.1.mlp.fc1", None, "stages.2.blocks.1.mlp.fc2"),
    "torchvision/convnext": ("features.1.0.block.3", None, "features.1.0.block.5"),
    "tiny/bottleneck-resnet": ("layer3.0.conv1", "layer3.0.conv2", "layer3.0.conv3"),
}
OPTIONS = {"r": 5, "share": 0.6}


def std(t: Tensor) -> Tensor:
    return (t - t.mean()).pow(2).mean().sqrt()


def matrix(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    return weight if weight.ndim == 2 else weight.sum((2, 3))


@pytest.mark.parametrize("family", STANDS)
def test_it_is_the_formula(family) -> None:
    model = visadapt.inject(FAMILIES[family].make().double(), CoLoRA(**OPTIONS), task="task", num_classes=3)
    stir(model, "task")
    parts = registry_of(model).parts("task")
    first, between, last = (None if path is None else model.get_submodule(path) for path in PAIRS[family])
    near, far = (parts[path]["colora"] for path in (PAIRS[family][0], PAIRS[family][2]))
    b, a, middle = near.factor.b, near.factor.a, torch.eye(len(matrix(first))).double()
    assert len(a) == 3
    assert near.a.shape[0] == far.a.shape[0] == 2
    middle = middle if between is None else matrix(between)
    size = (3 * len(b)) ** 0.25
    back, ahead = (matrix(last) @ middle).t() @ b, a @ (middle @ matrix(first)).t()
    independent = [p.b @ p.a / (math.sqrt(2) * (std(p.a) + std(p.b))) for p in (near, far)]
    deltas = (
        back @ a / (size * (std(back) + std(a))) + independent[0],
        b @ ahead / (size * (std(ahead) + std(b))) + independent[1],
    )
    with visadapt.using(model, "task"):
        for module, delta in zip((first, last), deltas, strict=True):
            expected = module._parameters["weight"] + delta.view_as(module._parameters["weight"])
            torch.testing.assert_close(module.weight, expected)


def test_the_count_is_the_formula() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("convnext_small", num_classes=10)
    visadapt.inject(model, CoLoRA(), norms="frozen", head="frozen")
    expected = 0
    for d, blocks in zip((96, 192, 384, 768), (3, 3, 27, 3), strict=True):
        shared = int(0.6 * (d // 16))
        expected += blocks * (2 * d * shared + 10 * d * (d // 16 - shared) + d * (d // 64 + 9))
    summary = visadapt.summary(model)
    assert summary["default"].adapters == expected
    assert 0.03 < summary["default"].fraction < 0.06  # the paper: 5 %


def test_the_count_on_a_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    visadapt.inject(model, CoLoRA(r=10), norms="frozen", head="frozen")
    expected, inputs = 0, 64
    for w, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for _ in range(blocks):
            d = 4 * w
            expected += 6 * (d + inputs) + 4 * ((inputs + w) + (9 * w + w) + (w + d))
            inputs = d
    assert visadapt.summary(model)["default"].adapters == expected


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("family", STANDS)
def test_identity_gradients_and_mixed_batches(family, branch) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(4)
    method = CoLoRA(r=3, branch=branch)
    before = answer(model, inputs)
    visadapt.inject(model, method, task="same", head="frozen", norms="frozen")
    assert torch.equal(answer(model, inputs, "same"), before)
    step(model, inputs)
    named = dict(visadapt.named_parameters(model, "same"))
    assert all(p.grad.any() for name, p in named.items() if name.endswith(".b"))
    for i, task in enumerate(("one", "two")):
        visadapt.inject(model, method, task=task, num_classes=3 + i)
    mixed_equals_alone(model, inputs, ("one", "two", None, "one"))


@pytest.mark.parametrize("family", STANDS)
def test_it_merges_without_the_branch(family) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2)
    visadapt.inject(model, CoLoRA(r=3, branch=False), task="task", num_classes=3).eval()
    stir(model, "task")
    plain = visadapt.merge(model, "task")
    with torch.no_grad():
        torch.testing.assert_close(output(plain, inputs), answer(model, inputs, "task"), rtol=1e-4, atol=1e-4)


def test_the_branch_does_not_merge() -> None:
    model = visadapt.inject(FAMILIES["timm/convnext"].make(), CoLoRA(), task="task", num_classes=3).eval()
    with pytest.raises(VisadaptError, match=r"conv_dw cannot be merged: its filter depends .*branch=False"):
        visadapt.merge(model, "task")


@pytest.mark.parametrize("family", STANDS)
def test_saved_loaded_and_copied(family, tmp_path) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2)
    visadapt.inject(model, CoLoRA(r=3), task="task", num_classes=3)
    stir(model, "task")
    expected = answer(model, inputs, "task")
    copied = copy.deepcopy(model)
    path = visadapt.save(model, "task", tmp_path / "task.visadapt")
    stir(model, "task", seed=2)
    assert torch.equal(answer(copied, inputs, "task"), expected)
    again = FAMILIES[family].make()
    visadapt.load(again, path)
    assert torch.equal(answer(again, inputs, "task"), expected)
    visadapt.eject(again)
    assert torch.equal(answer(again, inputs), answer(FAMILIES[family].make(), inputs))


def test_compiles_whole() -> None:
    model, inputs = FAMILIES["timm/convnext"].make(), FAMILIES["timm/convnext"].inputs(2)
    visadapt.inject(model, CoLoRA(r=3), task="task", head="copy")
    stir(model, "task")
    expected = answer(model, inputs, "task")
    torch._dynamo.reset()
    compiled = compiled_whole(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, inputs), expected)


@pytest.mark.parametrize("family", ["tiny/resnet", "tiny/vgg", "series"])
def test_other_blocks_are_refused_by_name(family) -> None:
    with pytest.raises(VisadaptError, match=r"CoLoRA knows blocks of ConvNeXt .* block:\S+ has "):
        visadapt.inject(CONVOLUTIONAL[family].make(), CoLoRA(), num_classes=3)


class Mixer(nn.Module):
    """Defines its depthwise convolution first and runs it second, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.conv(self.first(x).transpose(1, 2)).transpose(1, 2))


def test_layers_that_do_not_follow_one_another_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Mixer(), Mixer(), nn.Linear(8, 3))
    with pytest.raises(VisadaptError, match=r"the widths of 1\.conv, 1\.first, 1\.last do not"):
        visadapt.inject(model, CoLoRA(), norms="frozen", where="block", example=torch.randn(2, 5, 4))


def test_grouped_bottlenecks_are_refused_by_name() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnext26ts", num_classes=3)
    with pytest.raises(VisadaptError, match="pointwise, grouped, pointwise"):
        visadapt.inject(model, CoLoRA())


@pytest.mark.parametrize("rank", [1, 2])
def test_the_filter_is_the_weighted_mean_of_its_equation(rank) -> None:
    shape = (1, 2, *(9, 7)[:rank])
    z = torch.randn(shape, dtype=torch.float64)
    found = edge_preserving(z, rank)
    positions = list(torch.cartesian_prod(*(torch.arange(n) for n in shape[2:])).view(-1, rank))
    for channel in range(2):
        plane = z[0, channel]
        spread = plane.max() - plane.min() + 1e-5
        for i in positions:
            total, weights = 0.0, 0.0
            for j in positions:
                if (i - j).abs().max() <= 5:
                    near = torch.exp(-((i - j) ** 2).sum() / 2.0)
                    w = near * torch.cos(math.pi * (plane[tuple(i)] - plane[tuple(j)]) / (2 * spread))
                    total, weights = total + w * plane[tuple(j)], weights + w
            expected = plane[tuple(i)] + 0.2 * total / weights
            torch.testing.assert_close(found[(0, channel, *i)], expected)


def test_the_filter_keeps_what_is_constant() -> None:
    z = torch.full((2, 3, 5, 5), 0.7)
    torch.testing.assert_close(edge_preserving(z, 2), 1.2 * z)


@pytest.mark.parametrize("options", [{"r": 0}, {"share": 1.0}, {"branch": 1}])
def test_options_are_checked(options) -> None:
    with pytest.raises(VisadaptError, match=next(iter(options))):
        CoLoRA(**options)


def test_it_learns_and_nothing_else_does() -> None:
    member = ZOO["torchvision/resnet50"]
    model, inputs = member.make(), member.inputs()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    visadapt.inject(model, CoLoRA(r=2, share=0.5), task="task", num_classes=3, where="layer4")
    step(model.train(), inputs)
    with torch.no_grad():
        for p in visadapt.parameters(model, "task"):
            p.sub_(p.grad)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not torch.equal(answer(model, inputs, "task"), answer(model, inputs, None))
