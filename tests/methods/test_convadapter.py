import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visadapt as v
from tests.methods.test_parallel import GEOMETRIES
from tests.models import ZOO, answer, stir
from visadapt.backbone.site import Site
from visadapt.methods.convadapter import SCHEMES
from visadapt.methods.slot import _KEPT


def delta(part: nn.Module, x, **geometry):
    z = F.conv2d(x, part.down.weight, part.down.bias, groups=part.groups, **geometry)
    return part.scale.view(1, -1, 1, 1) * F.conv2d(F.relu(z), part.up.weight, part.up.bias)


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "same"])
def test_the_equation(name) -> None:
    """Δ has the geometry of the conv it stands beside."""
    conv = nn.Conv2d(8, 6, **GEOMETRIES[name])
    part = v.ConvAdapter(gamma=2, init="release").build(Site("c", "conv3x3", 6, "NCHW", 0), conv)
    nn.init.normal_(part.scale)
    x = torch.randn(2, 8, 12, 12)
    geometry = {k: value for k, value in GEOMETRIES[name].items() if k != "kernel_size"}
    assert part.down.weight.shape == (4, 2, *conv.kernel_size)
    torch.testing.assert_close(part(x), delta(part, x, **geometry))


def test_where_gamma_does_not_divide_the_channels() -> None:
    part = v.ConvAdapter(gamma=4).build(Site("c", "conv3x3", 6, "NCHW", 0), nn.Conv2d(10, 6, 3, padding=1))
    assert part.down.weight.shape == (2, 5, 3, 3)
    stem = v.ConvAdapter(gamma=4).build(Site("c", "conv3x3", 6, "NCHW", 0), nn.Conv2d(3, 6, 3, padding=1))
    assert stem(torch.randn(1, 3, 5, 5)).shape == (1, 6, 5, 5)


def test_the_number_of_parameters() -> None:
    c, gamma, k = 64, 4, 3
    count = v.ConvAdapter(gamma=gamma).count(Site("c", "conv3x3", c, "NCHW", 0), nn.Conv2d(c, c, k, padding=1))
    assert count == c * k * k + c // gamma * (1 + c) + 2 * c


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_schemes(tiny, scheme) -> None:
    """Each against the same block written out, at a block with a stride."""
    v.inject(tiny, v.ConvAdapter(scheme=scheme), where="layer2.0*", norms="frozen", head="frozen")
    stir(tiny, "default", seed=3)
    block = tiny.layer2[0]
    x = torch.randn(2, 8, 9, 9)

    def part(host):
        return host.visadapt["default"]["convadapter"]

    def conv(layer, x, stride):
        plain = F.conv2d(x, layer.weight, None, stride, 1)
        if scheme == "conv-parallel":
            return plain + delta(part(layer), x, stride=stride, padding=1)
        return plain + delta(part(layer), plain, padding=1) if scheme == "conv-sequential" else plain

    with torch.no_grad():
        y = F.relu(block.bn1(conv(block.conv1, x, 2)))
        y = conv(block.conv2, y, 1)
        with v.using(tiny, None):
            y = block.bn2(y)
            shortcut = block.downsample(x)
        if scheme == "residual-parallel":
            y = y + delta(part(block.bn2), x, stride=2, padding=1)
        elif scheme == "residual-sequential":
            y = y + delta(part(block.bn2), y, padding=1)
        torch.testing.assert_close(block(x), F.relu(y + shortcut))


@pytest.mark.parametrize("size", [64, 57, 33])
def test_a_branch_of_any_size(tiny, size) -> None:
    v.inject(tiny, v.ConvAdapter(scheme="residual-parallel", init="release"), head="frozen")
    assert tiny(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_nothing_is_kept(tiny, image) -> None:
    v.inject(tiny, v.ConvAdapter(scheme="residual-parallel"))
    tiny.train()
    tiny(image).sum().backward()
    assert not _KEPT.__dict__
    with pytest.raises(v.VisadaptError, match="outside of its block"):
        tiny.layer1[0].bn2(torch.randn(1, 8, 4, 4))


def test_threads_do_not_meet(tiny) -> None:
    for i in range(2):
        v.inject(tiny, v.ConvAdapter(scheme="residual-parallel"), task=f"t{i}")
        stir(tiny, f"t{i}", seed=i)
    inputs = [{"x": torch.randn(2, 3, 64, 64)} for _ in range(4)]
    expected = [answer(tiny, x, f"t{i % 2}") for i, x in enumerate(inputs)]
    wrong = []

    def work(i):
        with torch.no_grad(), v.using(tiny, f"t{i % 2}"):
            wrong.extend(i for _ in range(5) if not torch.equal(tiny(inputs[i]["x"]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_refused(tiny) -> None:
    for options in ({"gamma": 0}, {"scheme": "parallel"}, {"init": "he"}):
        with pytest.raises(v.VisadaptError, match=next(iter(options))):
            v.ConvAdapter(**options)
    with pytest.raises(v.VisadaptError, match=r"residual-parallel needs the input of a residual branch.*features.2"):
        v.inject(ZOO["tiny/vgg_bn"].make(), v.ConvAdapter(scheme="residual-parallel"))
    with pytest.raises(v.VisadaptError, match="is a token sequence"):
        v.inject(ZOO["transformers/bert"].make(), v.ConvAdapter(), where="mlp")
    part = v.ConvAdapter().build(Site("c", "conv3x3", 8, "NCHW", 0), tiny.layer1[0].conv1)
    for rule in (part.as_affine, lambda: part.as_kernel(tiny.layer1[0].conv1)):
        with pytest.raises(v.VisadaptError, match="nonlinearity"):
            rule()
