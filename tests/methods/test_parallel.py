import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visadapt as v
from tests.models import ZOO, answer, stir, train
from visadapt.backbone.operators import operator_of
from visadapt.backbone.site import Site
from visadapt.methods.parallel import ParallelAdapter

GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "strided and dilated": {"kernel_size": 3, "padding": 3, "dilation": 3, "stride": (2, 1)},
    "7x7": {"kernel_size": 7, "padding": 3, "stride": 2},
    "1x1": {"kernel_size": 1, "stride": 2},
    "oblong": {"kernel_size": (1, 5), "padding": (0, 2)},
    "unpadded": {"kernel_size": 3, "padding": 0},
    "padded more": {"kernel_size": 3, "padding": 3},
    "patches": {"kernel_size": 4, "stride": 4},
    "even": {"kernel_size": 2, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
}


def adapter(conv: nn.Module, method: v.Method | None = None) -> ParallelAdapter:
    operator = operator_of(conv, "conv")
    part = (method or v.Parallel()).build(Site("conv", "conv3x3", operator.outputs, operator.layout, 0), conv)
    for p in part.parameters():
        nn.init.normal_(p)
    return part.double()


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_centre_tap(geometry, size) -> None:
    """Beside any convolution it is exactly another kernel in the same place."""
    conv = nn.Conv2d(3, 5, **GEOMETRIES[geometry]).double()
    part = adapter(conv)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    beside = conv(x) + part(x)
    with torch.no_grad():
        conv.weight += part.as_kernel(conv)["weight"]
    torch.testing.assert_close(conv(x), beside, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_padding_as_tensorflow_does(size) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    conv = timm_layers.Conv2dSame(3, 5, 3, stride=2).double()
    part = adapter(conv)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    beside = conv(x) + part(x)
    with torch.no_grad():
        conv.weight += part.as_kernel(conv)["weight"]
    torch.testing.assert_close(conv(x), beside, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [v.Parallel(), v.Parallel(rank=2)], ids=str)
def test_the_equation(method) -> None:
    conv = nn.Conv2d(4, 6, 3, 2, 1)
    part = adapter(conv, method)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    a = part.full.weight if method.rank is None else part.beta.weight @ part.gamma.weight
    assert a.shape == (6, 4)
    torch.testing.assert_close(part(x), F.conv2d(x, a[:, :, None, None], stride=2))


def test_beside_a_linear() -> None:
    linear = nn.Linear(4, 6).double()
    part = adapter(linear, v.Parallel(rank=2))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    beside = linear(x) + part(x)
    with torch.no_grad():
        linear.weight += part.as_kernel(linear)["weight"]
    torch.testing.assert_close(linear(x), beside)


def test_what_has_no_kernel_is_told() -> None:
    grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    part = adapter(grouped)
    assert part(torch.randn(1, 4, 5, 5, dtype=torch.float64)).shape == (1, 4, 5, 5)
    with pytest.raises(v.VisadaptError, match=r"dense 1×1 beside a grouped convolution \(2 groups\)"):
        part.as_kernel(grouped)

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std())

    odd = Standardised(4, 4, 1)
    with pytest.raises(v.VisadaptError, match="Standardised does more"):
        adapter(odd).as_kernel(odd)


def test_starts(tiny) -> None:
    """Zero by default, both factors never at once; He-normal by choice."""
    for method in (v.Parallel(), v.Parallel(rank=4)):
        v.inject(tiny, method, task=f"t{method.rank}")
    named = dict(v.named_parameters(tiny, "tNone")) | dict(v.named_parameters(tiny, "t4"))
    at = "layer4.0.conv1.parallel"
    assert not named[f"{at}.full.weight"].any()
    assert not named[f"{at}.gamma.weight"].any()
    assert named[f"{at}.beta.weight"].std().item() == pytest.approx(0.5, rel=0.3)
    conv = nn.Conv2d(64, 128, 3, padding=1)
    site = Site("conv", "conv3x3", 128, "NCHW", 0)
    for method in (v.Parallel(init="he"), v.Parallel(rank=64, init="he")):
        assert method.build(site, conv).matrix().std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_dropout_is_of_whole_channels_while_training() -> None:
    conv = nn.Conv2d(64, 64, 1)
    part = v.Parallel(dropout=0.5).build(Site("c", "conv3x3", 64, "NCHW", 0), conv)
    with torch.no_grad():
        part.full.weight.copy_(torch.eye(64))
    x = torch.ones(4, 64, 3, 3)
    y = part(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y == y[:, :, :1, :1]).all()
    assert torch.equal(part.eval()(x), x)


def test_a_factor_is_shared(tiny, image, tmp_path) -> None:
    v.inject(tiny, v.Parallel(rank=0.25), task="source", num_classes=4)
    train(tiny, "source", {"x": image})
    before = answer(tiny, {"x": image}, None)
    v.inject(tiny, v.Parallel(rank=0.25, factor_of="source"), task="heir", head="frozen")
    assert torch.equal(answer(tiny, {"x": image}, "heir"), before)
    source, heir = (dict(v.named_parameters(tiny, task)) for task in ("source", "heir"))
    at = "layer2.0.conv1.parallel"
    assert f"{at}.beta.weight" not in heir
    assert heir[f"{at}.gamma.weight"].shape == (4, 8)
    shared = tiny.get_submodule("layer2.0.conv1.visadapt.heir.parallel").beta.weight
    assert torch.equal(shared, source[f"{at}.beta.weight"])
    train(tiny, "heir", {"x": image})
    assert torch.equal(shared, source[f"{at}.beta.weight"])
    assert v.summary(tiny)["heir"].adapters < 0.7 * v.summary(tiny)["source"].adapters
    # the heir's file needs no source, and its factor is the one it was trained with
    expected = answer(tiny, {"x": image}, "heir")
    v.save(tiny, "heir", tmp_path / "heir.visadapt")
    stir(tiny, "source")
    fresh = ZOO["tiny/resnet"].make()
    v.load(fresh, tmp_path / "heir.visadapt")
    assert torch.equal(answer(fresh, {"x": image}, "heir"), expected)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (v.Parallel(rank=4, factor_of="sorce"), "no task 'sorce'.*did you mean 'source'"),
        (v.Parallel(rank=3, factor_of="source"), "has rank 4, not 3"),
        (v.Parallel(rank=4, factor_of="full"), "no task 'full' with a low-rank Parallel"),
    ],
    ids=str,
)
def test_a_factor_that_is_not_there(tiny, method, said) -> None:
    v.inject(tiny, v.Parallel(rank=4), task="source")
    v.inject(tiny, v.Parallel(), task="full")
    with pytest.raises(v.VisadaptError, match=said):
        v.inject(tiny, method, task="heir")
    assert list(v.tasks(tiny)) == ["source", "full"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": 1.5}, "rank must be a positive integer"),
        ({"factor_of": "x"}, "give rank="),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "kaiming"}, "no init 'kaiming'"),
    ],
)
def test_options_are_checked(options, said) -> None:
    with pytest.raises(v.VisadaptError, match=said):
        v.Parallel(**options)


def test_a_norm_is_no_place_for_it(tiny) -> None:
    with pytest.raises(v.VisadaptError, match=r"block:layer1.0.bn2 is a BatchNorm2d, neither"):
        v.inject(tiny, v.Parallel(), where="block")
    assert not v.tasks(tiny)


def test_tsa(tiny, image) -> None:
    v.inject(tiny, v.TSA(align=True), num_classes=4, norms="frozen")
    named = dict(v.named_parameters(tiny, "default"))
    assert torch.equal(named["layer1.0.conv2.tsa.full.weight"], torch.eye(8) * 1e-4)
    assert torch.equal(named["layer2.0.conv1.tsa.full.weight"], torch.eye(16, 8) * 1e-4)
    assert named["fc.tsa.align.weight"].shape == (32, 32)
    # f + D·f goes into the task's own head
    with torch.no_grad():
        named["fc.tsa.align.weight"].copy_(torch.eye(32))
    doubled = answer(tiny, {"x": image}, "default")
    with torch.no_grad():
        named["fc.tsa.align.weight"].zero_()
        named["fc.head.weight"].mul_(2)
    torch.testing.assert_close(answer(tiny, {"x": image}, "default"), doubled)
    with pytest.raises(v.VisadaptError, match="init, the ε in"):
        v.TSA(init=2)


def test_tsa_aligns_before_a_head_of_several_modules() -> None:
    member = ZOO["transformers/roberta"]
    model = member.make()
    before = answer(model, member.inputs())
    v.inject(model, v.TSA(align=True), where="query", norms="frozen")
    named = dict(v.named_parameters(model, "default"))
    assert named["classifier.tsa.align.weight"].shape == (32, 32)
    torch.testing.assert_close(answer(model, member.inputs(), "default"), before, rtol=1e-2, atol=1e-2)
    at = answer(model, member.inputs(), "default")
    with torch.no_grad():
        named["classifier.tsa.align.weight"].fill_(0.1)
    assert not torch.allclose(answer(model, member.inputs(), "default"), at, atol=1e-3)
    headless = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(v.VisadaptError, match="needs a head, and none was found in Sequential"):
        v.inject(headless, v.TSA(align=True), where="0", example=torch.zeros(1, 3, 8, 8))
