import pytest
import torch
from torch import nn

import visadapt as v
from tests.models import answer, stir, train
from visadapt.backbone.site import Site

SITE = Site("conv", "conv3x3", 6, "NCHW", 0)


def drawn(part: nn.Module) -> nn.Module:
    for p in part.parameters():
        nn.init.normal_(p)
    return part.double()


def test_the_equation() -> None:
    part = drawn(v.Series().build(SITE, nn.Conv2d(3, 6, 3)))
    u = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    mean, var = u.mean((0, 2, 3), keepdim=True), u.var((0, 2, 3), unbiased=False, keepdim=True)
    gamma, beta = (p.view(1, -1, 1, 1) for p in (part.norm.weight, part.norm.bias))
    normed = (u - mean) / (var + part.norm.eps).sqrt() * gamma + beta
    expected = u + torch.einsum("oc,nchw->nohw", part.project.weight, normed)
    torch.testing.assert_close(part(u), expected)


@pytest.mark.parametrize("norm", [True, False])
def test_in_eval_mode_it_is_affine(norm) -> None:
    part = drawn(v.Series(norm=norm).build(SITE, nn.Conv2d(3, 6, 3)))
    u = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    part(u)
    if norm:
        with pytest.raises(v.VisadaptError, match="train mode"):
            part.as_affine()
    part.eval()
    matrix, offset = part.as_affine()
    expected = torch.einsum("oc,nchw->nohw", matrix, u) + (0 if offset is None else offset.view(1, -1, 1, 1))
    torch.testing.assert_close(part(u), expected)
    assert (offset is None) is not norm


def test_its_statistics_are_the_tasks(tiny, image, tmp_path) -> None:
    """They move while it trains, whatever the policy for the backbone's norms, and are in the file."""
    v.inject(tiny, v.Series(), norms="frozen", num_classes=4)
    before = tiny.get_submodule("layer1.0.conv1.visadapt.default.series.norm").running_mean.clone()
    train(tiny, "default", {"x": image})
    norm = tiny.get_submodule("layer1.0.conv1.visadapt.default.series.norm")
    assert not torch.equal(norm.running_mean, before)
    expected = answer(tiny, {"x": image}, "default")
    file = v.save(tiny, "default", tmp_path / "s.visadapt")
    moved = norm.running_mean.clone()
    v.eject(tiny)
    v.load(tiny, file)
    assert torch.equal(tiny.get_submodule("layer1.0.conv1.visadapt.default.series.norm").running_mean, moved)
    assert torch.equal(answer(tiny, {"x": image}, "default"), expected)


def test_in_a_mixed_batch_it_sees_its_own_samples_only(tiny) -> None:
    x = torch.randn(6, 3, 64, 64)
    v.inject(tiny, v.Series(), task="a", norms="frozen")
    v.inject(tiny, v.Series(), task="b", norms="frozen")
    stir(tiny, "a", 1)
    stir(tiny, "b", 2)
    tiny.train()
    part = tiny.get_submodule("layer1.0.conv1.visadapt.a.series")
    with torch.no_grad(), v.using(tiny, ["a", "b", "b", "a", "a", "b"]):
        tiny(x)
    mixed = part.norm.running_mean.clone()
    part.norm.reset_running_stats()
    with torch.no_grad(), v.using(tiny, "a"):
        tiny(x[[0, 3, 4]])
    torch.testing.assert_close(part.norm.running_mean, mixed)


def test_he_normal_by_choice() -> None:
    part = v.Series(init="he").build(Site("c", "conv3x3", 128, "NCHW", 0), nn.Conv2d(3, 128, 3))
    assert part.project.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_what_is_refused() -> None:
    with pytest.raises(v.VisadaptError, match="no init 'x'"):
        v.Series(init="x")
    with pytest.raises(v.VisadaptError, match="token sequence: norm=False"):
        v.Series().build(Site("l", "mlp", 6, "NLC", 0), nn.Linear(3, 6))
