import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import visadapt as v
from tests.models import ZOO, answer, stir, train
from visadapt.backbone.site import Site
from visadapt.methods.dan import packed, quantised, rounded, unpacked


def controller(host: nn.Module, **options) -> nn.Module:
    part = v.DAN(**options).build(Site("host", "conv3x3", len(host.weight), "NCHW", 0), host)
    for p in part.parameters():
        nn.init.normal_(p)
    return part.double()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_equation(diagonal, groups) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    part = controller(conv, diagonal=diagonal)
    d = part.controller.diag() if diagonal else part.controller
    made = part(conv._parameters)
    expected = ((torch.eye(6, dtype=torch.float64) + d) @ conv.weight.flatten(1)).view_as(conv.weight)
    torch.testing.assert_close(made["weight"], expected)
    torch.testing.assert_close(made["bias"], conv.bias + part.bias)
    assert part({"bias": conv.bias}).keys() == {"bias"}


def test_the_switch(tiny, image, tmp_path) -> None:
    """α = 1 is the task, α = 0 the backbone bit for bit, and a kernel between is a mixture of the two."""
    bare = answer(tiny, {"x": image}, None)
    v.inject(tiny, v.DAN(), norms="frozen")
    stir(tiny, "default")
    adapted = answer(tiny, {"x": image}, "default")
    assert v.set_alpha(tiny, "default", 0) is tiny
    assert torch.equal(answer(tiny, {"x": image}, "default"), bare)
    v.set_alpha(tiny, "default", 1.0)
    assert torch.equal(answer(tiny, {"x": image}, "default"), adapted)
    v.set_alpha(tiny, "default", 0.5)
    half = answer(tiny, {"x": image}, "default")
    assert not torch.equal(half, adapted)
    conv = tiny.get_submodule("layer1.0.conv1")
    part = tiny.get_submodule("layer1.0.conv1.visadapt.default.dan")
    with v.using(tiny, None):
        kernel = conv.weight
    mixture = kernel + 0.5 * (part.controller @ kernel.flatten(1)).view_as(kernel)
    torch.testing.assert_close(conv.weight, mixture)
    # the file remembers
    file = v.save(tiny, "default", tmp_path / "d.visadapt")
    v.eject(tiny)
    v.load(tiny, file)
    assert torch.equal(answer(tiny, {"x": image}, "default"), half)
    assert v.tasks(tiny)["default"].placements[0].method == v.DAN(alpha=0.5)


def test_a_switch_that_is_not_there(tiny) -> None:
    v.inject(tiny, m=2)
    with pytest.raises(v.VisadaptError, match="has no DAN"):
        v.set_alpha(tiny, "default", 0.5)
    v.inject(tiny, v.DAN(), task="dan")
    for alpha in (2, -0.1, True, "1"):
        with pytest.raises(v.VisadaptError, match="alpha must be a number"):
            v.set_alpha(tiny, "dan", alpha)
    with pytest.raises(v.VisadaptError, match="did you mean 'dan'"):
        v.set_alpha(tiny, "dann", 0.5)


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 9), st.floats(-30, 30), st.integers(0, 5))
def test_rounding_twice_is_rounding_once(bits, rows, columns, scale, seed) -> None:
    """What is stored is what is evaluated, bit for bit, however often it is stored."""
    d = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    once = rounded(d, bits)
    assert torch.equal(rounded(once, bits), once)
    codes, steps = quantised(d, bits)
    assert torch.equal(codes * steps, once)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert ((once - d).abs() <= steps * 0.501).all()
    stored = packed(codes, bits)
    assert stored.dtype == torch.uint8
    assert stored.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpacked(stored, bits, codes.numel()).view_as(codes).float(), codes)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 3])
def test_what_is_stored_is_what_is_evaluated(tiny, image, tmp_path, bits, diagonal) -> None:
    v.inject(tiny, v.DAN(bits=bits, diagonal=diagonal), norms="frozen", head="frozen")
    before = answer(tiny, {"x": image}, "default")
    train(tiny, "default", {"x": image})
    expected = answer(tiny, {"x": image}, "default")
    assert not torch.equal(expected, before)
    file = v.save(tiny, "default", tmp_path / "d.visadapt")
    fresh = ZOO["tiny/resnet"].make()
    v.load(fresh, file)
    assert torch.equal(answer(fresh, {"x": image}, "default"), expected)
    again = v.save(fresh, "default", tmp_path / "again.visadapt")
    assert again.read_bytes() == file.read_bytes()
    state = {k: t for k, t in tiny.state_dict().items() if ".dan." in k}
    fresh.load_state_dict(tiny.state_dict())
    assert torch.equal(answer(fresh, {"x": image}, "default"), expected)
    assert {k.rpartition(".")[2] for k in state} == {"codes", "scale"}
    if not diagonal:
        rows = sum(t.numel() for k, t in state.items() if k.endswith("scale"))
        size = v.summary(tiny)["default"].bytes
        assert size == sum(-(-p.numel() * bits // 8) for p in v.parameters(tiny)) + 4 * rows


def test_rows_of_zeros_are_zero() -> None:
    d = torch.zeros(3, 4)
    d[1] = torch.tensor([0.5, -1.0, 0.0, 0.25])
    assert torch.equal(rounded(d, 8)[0], d[0])
    d.requires_grad_()
    rounded(d, 4).sum().backward()
    assert torch.equal(d.grad, torch.ones(3, 4))


def test_beside_gpt2s_transposed_weights() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(6, 4).double()
    part = v.DAN().build(Site("c", "qkv", 6, "NLC", 0), layer).double()
    nn.init.normal_(part.controller)
    expected = layer.weight @ (torch.eye(6, dtype=torch.float64) + part.controller).t()
    torch.testing.assert_close(part(layer._parameters)["weight"], expected)


def test_a_kernel_that_is_no_parameter_is_refused(tiny) -> None:
    nn.utils.parametrizations.weight_norm(tiny.layer1[0].conv1)
    with pytest.raises(v.VisadaptError, match=r"conv3x3:layer1\.0\.conv1: its weight is computed anew"):
        v.inject(tiny, v.DAN())
    assert not v.tasks(tiny)
    v.inject(tiny, v.DAN(), where=range(1, 8))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"bits": True}, {"alpha": 1.5}])
def test_options_are_checked(options) -> None:
    with pytest.raises(v.VisadaptError, match=next(iter(options))):
        v.DAN(**options)
