"""Low-rank changes of weights that other code than their module computes with."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import visadapt


class Reads(nn.Module):
    """Computes with the weight of a linear that it never calls, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.bias = nn.Parameter(torch.randn(24))
        self.unused = nn.Linear(8, 8)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def beit() -> nn.Module:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("beit_base_patch16_224", num_classes=4, **size).eval()


def reads() -> nn.Module:
    return nn.Sequential(Reads(), Reads(), nn.Flatten(1), nn.Linear(32, 4)).eval()


CASES = [(beit, None, (3, 3, 16, 16)), (reads, "*.qkv", (3, 4, 8))]
METHODS = [visadapt.LoRA(r=2, alpha=4.0), visadapt.DoRA(r=2)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("make", "where", "shape"), CASES, ids=["beit", "reads"])
def test_it_acts_where_the_weight_is_read(make, where, shape, method, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    example = torch.zeros(2, *shape[1:])
    with torch.no_grad():  # other kernels compute with gradients
        expected = model(x)
    for task in "ab":
        visadapt.inject(model, method, task=task, num_classes=3, where=where, example=example)
        assert [site.kind for site in visadapt.sites(model, where or "weight", example=example)] == ["weight"] * 2
    with visadapt.using(model, None), torch.no_grad():
        assert torch.equal(model(x), expected)
    for p in visadapt.parameters(model, "a"):
        p.data.add_(torch.randn_like(p) * 0.1)
    with visadapt.using(model, "a"):
        alone = model(x)
        alone.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in visadapt.parameters(model, "a"))
    with visadapt.using(model, "b"):
        other = model(x)
    with visadapt.using(model, ["a", "b", "a"]):
        torch.testing.assert_close(model(x), torch.stack([alone[0], other[1], alone[2]]))
    torch.testing.assert_close(visadapt.merge(model, "a", probe=x)(x), alone)
    visadapt.save(model, "a", tmp_path / "a.visadapt")
    visadapt.eject(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    visadapt.load(model, tmp_path / "a.visadapt")
    with visadapt.using(model, "a"):
        assert torch.equal(model(x), alone)


@pytest.mark.parametrize(
    ("method", "where", "said"),
    [
        (visadapt.Bottleneck(m=2), "0.qkv", "0.qkv is never called: .* changes the weight itself, such as LoRA"),
        (visadapt.LoRA(r=2, dropout=0.1), "0.qkv", "dropout must be 0"),
        (visadapt.LoRA(r=2), "0.unused", "0.unused is never called"),
    ],
)
def test_what_cannot_act_there_is_refused(method, where, said) -> None:
    with pytest.raises(visadapt.VisadaptError, match=said):
        visadapt.inject(reads(), method, where=where, example=torch.zeros(2, 4, 8))
