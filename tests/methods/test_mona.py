"""Mona: its formula in every layout, its size, and where tokens lie on their map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visadapt
from tests.methods.families import FAMILIES, mixed_equals_alone
from tests.models import ZOO, answer, stir
from visadapt import Mona, Site, VisadaptError
from visadapt.backbone.token_grid import TokenGrid
from visadapt.methods.mona import MonaAdapter

# the three kernels of a narrow volume or map are more than its one
pytestmark = pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")

SHAPES = {
    "NCHW": (2, 6, 9, 5),
    "NHWC": (2, 9, 5, 6),
    "NCL": (2, 6, 11),
    "NCDHW": (2, 6, 4, 5, 3),
    "NDHWC": (2, 4, 5, 3, 6),
}


def site(layout: str, channels: int = 6) -> Site:
    return Site("x", "block", channels, layout, 0)


def drawn(module: nn.Module, std: float = 0.5) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.double().eval()


def reference(a: MonaAdapter, h: torch.Tensor) -> torch.Tensor:
    """The authors' order of operations on a map with channels on axis 1."""
    last = h.movedim(1, -1)
    x = F.layer_norm(last, last.shape[-1:], a.norm.weight, a.norm.bias) * a.gamma + last * a.gamma_x
    y = F.linear(x, a.down.weight, a.down.bias).movedim(-1, 1)
    z = (
        y
        + sum(
            conv._conv_forward(F.pad(y, (k // 2,) * 2 * (y.ndim - 2)), conv.weight, conv.bias)
            for k, conv in zip((3, 5, 7), a.convs, strict=True)
        )
        / 3
    )
    z = z + F.linear(z.movedim(1, -1), a.mix.weight, a.mix.bias).movedim(-1, 1)
    return h + F.linear(F.gelu(z).movedim(1, -1), a.up.weight, a.up.bias).movedim(-1, 1)


@pytest.mark.parametrize("layout", SHAPES)
def test_it_is_the_formula_on_maps(layout: str) -> None:
    module = drawn(Mona(m=4).build(site(layout), nn.Identity()))
    h = torch.randn(SHAPES[layout], dtype=torch.float64)
    first = h if layout.startswith("NC") else h.movedim(-1, 1)
    expected = reference(module, first)
    torch.testing.assert_close(module(h), expected if layout.startswith("NC") else expected.movedim(1, -1))


@pytest.mark.parametrize("prefix", [0, 2])
def test_tokens_are_put_on_their_map(prefix: int) -> None:
    module = drawn(MonaAdapter(Mona(m=4), site("NLC"), TokenGrid(5, 3, prefix)))
    h = torch.randn(2, prefix + 15, 6, dtype=torch.float64)
    on_map = h[:, prefix:].transpose(1, 2).unflatten(2, (5, 3))
    out = module(h)
    torch.testing.assert_close(out[:, prefix:], reference(module, on_map).flatten(2).transpose(1, 2))
    # what comes before has no neighbours: the convolutions' weights do not matter to it
    before = out[:, :prefix].clone()
    for conv in module.convs:
        nn.init.normal_(conv.weight)
    torch.testing.assert_close(module(h)[:, :prefix], before)


@pytest.mark.parametrize(("d", "m"), [(6, 4), (64, 16), (768, 64)])
def test_the_count_is_the_formula(d: int, m: int) -> None:
    """The paper's (2m + 5)·d + m² + 84m, and the biases of the four inner convolutions."""
    assert Mona(m=m).count(site("NCHW", d), nn.Identity()) == (2 * m + 5) * d + m * m + 84 * m + 4 * m


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_it_was_and_every_sample_has_its_own_task(family: str) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(4)
    before = answer(model, inputs)
    for i, task in enumerate(("one", "two")):
        visadapt.inject(model, Mona(m=3), task=task, num_classes=3 + i)
    visadapt.inject(model, Mona(m=3), task="same", head="frozen", norms="frozen")
    assert torch.equal(answer(model, inputs, "same"), before)
    mixed_equals_alone(model, inputs, ("one", "two", None, "one"))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """The map of tokens is found again, where the sites were traced too."""
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(2)
    visadapt.inject(model, Mona(m=3), task="task", num_classes=3)
    stir(model, "task")
    expected = answer(model, inputs, "task")
    path = visadapt.save(model, "task", tmp_path / "task.visadapt")
    again = FAMILIES[family].make()
    visadapt.load(again, path)
    assert torch.equal(answer(again, inputs, "task"), expected)


def test_the_release_does_not_start_as_it_was() -> None:
    model, inputs = ZOO["tiny/resnet"].make(), ZOO["tiny/resnet"].inputs()
    before = answer(model, inputs)
    visadapt.inject(model, Mona(m=4, init="release"), head="frozen", norms="frozen")
    assert not torch.allclose(answer(model, inputs, "default"), before, atol=1e-3)


def test_a_sequence_without_a_map_is_refused() -> None:
    with pytest.raises(VisadaptError, match=r"attention:bert\.encoder\.layer\.0.* has tokens, and no map .* grid="):
        visadapt.inject(ZOO["transformers/bert"].make(), Mona(m=2))


def test_a_map_that_the_user_names() -> None:
    model, inputs = FAMILIES["timm/vit"].make(), FAMILIES["timm/vit"].inputs(2)
    visadapt.inject(model, Mona(m=2), task="recorded", num_classes=3)
    stir(model, "recorded")
    visadapt.inject(model, Mona(m=2, grid=(4, 4)), task="named", num_classes=3)
    stir(model, "named")
    with torch.no_grad():
        pairs = zip(visadapt.parameters(model, "named"), visadapt.parameters(model, "recorded"), strict=True)
        for own, other in pairs:
            own.copy_(other)
    assert torch.equal(answer(model, inputs, "named"), answer(model, inputs, "recorded"))


def test_tokens_of_another_map_are_refused() -> None:
    model = FAMILIES["timm/vit"].make()
    visadapt.inject(model, Mona(m=2, grid=(5, 5)), num_classes=3)
    with pytest.raises(VisadaptError, match="a map of 5×5, got a tensor of shape"):
        answer(model, FAMILIES["timm/vit"].inputs(2), "default")


def test_it_does_not_merge() -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), Mona(m=2), num_classes=3).eval()
    with pytest.raises(VisadaptError, match="cannot be merged: it has a nonlinearity"):
        visadapt.merge(model)
