import pytest
import torch
from torch import nn

import visadapt as v
from tests.methods.test_parallel import GEOMETRIES
from tests.models import ZOO
from visadapt.backbone.site import Site


def part_of(host: nn.Module, outputs: int, **options) -> nn.Module:
    part = v.LoRA(**{"r": 2, **options}).build(Site("host", "conv3x3", outputs, "NCHW", 0), host)
    for p in part.parameters():
        nn.init.normal_(p)
    return part.double()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_a_change_of_the_weight(geometry, groups) -> None:
    """At any geometry, grouped and depthwise too."""
    conv = nn.Conv2d(4, 8, groups=groups, **GEOMETRIES[geometry]).double()
    part = part_of(conv, 8, alpha=3)
    x = torch.randn(2, 4, 9, 13, dtype=torch.float64)
    beside = conv(x) + part(x)
    delta = part.as_kernel(conv)["weight"]
    assert torch.linalg.matrix_rank(delta.flatten(1)) <= 2
    with torch.no_grad():
        conv.weight += delta
    torch.testing.assert_close(conv(x), beside, rtol=1e-12, atol=1e-12)


def test_the_number_of_parameters_of_a_grouped_one() -> None:
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    assert v.LoRA(r=2).count(Site("c", "conv3x3", 16, "NCHW", 0), depthwise) == 2 * (9 + 16)


def test_beside_linears() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for layer in (nn.Linear(4, 6).double(), pytorch_utils.Conv1D(6, 4).double()):
        part = part_of(layer, 6, alpha=1)
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(part(x), 0.5 * x @ part.a.t() @ part.b.t())
        beside = layer(x) + part(x)
        with torch.no_grad():
            layer.weight += part.as_kernel(layer)["weight"]
        torch.testing.assert_close(layer(x), beside)


def test_where_it_stands() -> None:
    bert = v.inject(ZOO["transformers/bert"].make(), v.LoRA(r=2), norms="frozen")
    hosts = {name.rpartition(".")[2] for name in v.tasks(bert)["default"].placements[0].sites}
    assert hosts == {"query", "value"}
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2, num_classes=4)
    v.inject(vit, v.LoRA(r=2), norms="frozen")
    assert v.tasks(vit)["default"].placements[0].sites == ("qkv:blocks.0.attn.qkv", "qkv:blocks.1.attn.qkv")
    v.inject(vit, v.LoRA(r=2), task="mlp", where="*.mlp.fc1")
    assert len(v.tasks(vit)["mlp"].placements[0].sites) == 2


@pytest.mark.parametrize("options", [{"r": 0}, {"alpha": 0}, {"dropout": 1}])
def test_options_are_checked(options) -> None:
    with pytest.raises(v.VisadaptError, match=next(iter(options))):
        v.LoRA(**options)
