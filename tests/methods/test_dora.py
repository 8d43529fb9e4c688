"""DoRA: its formula for linears and convolutions of any geometry, its size, and merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visadapt
from tests.methods.families import CONVOLUTIONAL, FAMILIES, TEXT, mixed_equals_alone
from tests.methods.test_parallel import GEOMETRIES
from tests.models import ZOO, answer, output, step, stir
from visadapt import DoRA, Site, VisadaptError

ALL = FAMILIES | TEXT


def site(channels: int) -> Site:
    return Site("host", "conv3x3", channels, "NCHW", 0)


def drawn(host: nn.Module, outputs: int, **options) -> nn.Module:
    part = DoRA(**{"r": 2, **options}).build(site(outputs), host)
    for p in part.parameters():
        nn.init.normal_(p)
    return part.double()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_formula_on_convolutions(geometry, groups) -> None:
    conv = nn.Conv2d(4, 8, groups=groups, **GEOMETRIES[geometry]).double()
    part = drawn(conv, 8, alpha=3)
    v = conv.weight + 1.5 * (part.b @ part.a).view_as(conv.weight)
    expected = part.magnitude.view(-1, 1, 1, 1) * v / v.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(part(dict(conv.named_parameters()))["weight"], expected)


def test_it_is_the_formula_on_linears() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for layer, axis in ((nn.Linear(4, 6).double(), 1), (pytorch_utils.Conv1D(6, 4).double(), 0)):
        part = drawn(layer, 6)
        delta = part.b @ part.a
        v = layer.weight + (delta if axis else delta.t())
        expected = v / v.norm(dim=axis, keepdim=True) * (part.magnitude[:, None] if axis else part.magnitude)
        torch.testing.assert_close(part(dict(layer.named_parameters()))["weight"], expected)


def test_the_norm_is_a_constant_in_the_gradient() -> None:
    """§4.3: ∂W̃/∂V = m/‖V‖."""
    linear = nn.Linear(4, 6)
    part = drawn(linear, 6)
    with torch.no_grad():
        v = linear.weight + part.b @ part.a
        seen = torch.randn(6, 4, dtype=torch.float64)
        expected = (seen * (part.magnitude / v.norm(dim=1))[:, None]) @ part.a.t()
    part({"weight": linear.weight.detach().double()})["weight"].backward(seen)
    torch.testing.assert_close(part.b.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_starts_as_it_was(dtype) -> None:
    conv = nn.Conv2d(5, 7, 3).to(dtype)
    part = DoRA(r=2).build(site(7), conv).to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(part({"weight": conv.weight})["weight"], conv.weight)


def test_a_channel_of_zeros_stays_finite() -> None:
    linear = nn.Linear(4, 6)
    nn.init.zeros_(linear.weight)
    part = DoRA(r=2).build(site(6), linear)
    out = part({"weight": linear.weight})["weight"]
    out.sum().backward()
    assert torch.equal(out, linear.weight)
    assert all(torch.isfinite(p.grad).all() for p in part.parameters() if p.grad is not None)


def test_the_count_is_the_formula() -> None:
    assert DoRA(r=2).count(site(32), nn.Conv2d(16, 32, 3, groups=4)) == 2 * (4 * 9 + 32) + 32
    assert DoRA(r=4).count(site(32), nn.Linear(16, 32)) == 4 * (16 + 32) + 32


@pytest.mark.parametrize("family", ALL)
def test_identity_gradients_mixed_batches_and_merging(family) -> None:
    model, inputs = ALL[family].make(), ALL[family].inputs(4)
    # torch's own attention has no projections of its own that could be sites
    where = "conv" if family in CONVOLUTIONAL else "linear" if family == "torchvision/vit" else None
    before = answer(model, inputs)
    visadapt.inject(model, DoRA(r=1), task="same", head="frozen", norms="frozen", where=where)
    assert torch.equal(answer(model, inputs, "same"), before)
    step(model, inputs)
    named = dict(visadapt.named_parameters(model, "same"))
    assert all(p.grad is not None and p.grad.any() for name, p in named.items() if not name.endswith(".a"))
    for i, task in enumerate(("one", "two")):
        visadapt.inject(model, DoRA(r=1), task=task, num_classes=3 + i, where=where)
    mixed_equals_alone(model, inputs, ("one", "two", None, "one"))
    plain = visadapt.merge(model, "one", probe=False)
    with torch.no_grad():
        torch.testing.assert_close(output(plain, inputs), answer(model, inputs, "one"), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(tmp_path) -> None:
    model, inputs = ZOO["tiny/resnet"].make(), ZOO["tiny/resnet"].inputs()
    visadapt.inject(model, DoRA(r=2, alpha=4), task="one", num_classes=3)
    stir(model, "one")
    expected = answer(model, inputs, "one")
    path = visadapt.save(model, "one", tmp_path / "one.visadapt")
    again = ZOO["tiny/resnet"].make()
    visadapt.load(again, path)
    assert torch.equal(answer(again, inputs, "one"), expected)


def test_a_weight_of_integers_is_refused() -> None:
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(VisadaptError, match=r"keeps its weight in torch\.int8"):
        DoRA(r=2).build(site(6), linear)
