"""Lean frozen layers compute what plain ones do, keep less, and go away without a trace."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

import visadapt
from visadapt import lean, unlean
from visadapt.frozen.bits import format_of, pack, unpack
from visadapt.frozen.functions import FrozenConv, IndexedMaxPool, MaskedReLU
from visadapt.sites import own_modules

BACKBONES = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnext50": lambda: torchvision.models.resnext50_32x4d(),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(),
    "seresnet50": lambda: timm.create_model("seresnet50"),
    "efficientnet": lambda: timm.create_model("efficientnet_lite0"),
    "convnext": lambda: timm.create_model("convnext_atto"),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
}


def injected(name, norms="frozen", dtype=torch.float64):
    torch.manual_seed(0)
    model = BACKBONES[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # statistics and gains away from 0 and 1: a fold that forgot one of them shows
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    visadapt.inject(model, m=4, task="t", num_classes=5, norms=norms)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "t"):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def step(model, x):
    """Logits, gradients and the bytes that autograd keeps beside parameters and buffers."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(len(x)) % 5)
    gradients = torch.autograd.grad(loss, visadapt.parameters(model, "t"))
    return logits.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("norms", ["frozen", "affine"])
@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_and_gradients_are_those_of_the_plain_model(name, norms):
    model, x = injected(name, norms), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    logits, gradients, kept = step(model, x)
    found, lean_gradients, lean_kept = step(lean(model), x)
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    if name != "vit":  # it has no conv behind its first site, no ReLU, no max-pool: it is as lean as it can be
        assert lean_kept < kept
    again, plain_gradients, plain_kept = step(unlean(model), x)
    assert torch.equal(again, logits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain_gradients, gradients, strict=True))
    assert plain_kept == kept


def test_a_frozen_resnet_keeps_a_third():
    model, x = injected("resnet18", dtype=torch.float32), torch.randn(2, 3, 64, 64)
    kept = step(model, x)[2]
    assert step(lean(model), x)[2] < kept / 3


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_nothing_shows_and_everything_goes_away(name):
    model = injected(name)
    keys = list(model.state_dict())
    classes = {path: type(module) for path, module in own_modules(model).items()}
    lean(model)
    assert list(model.state_dict()) == keys
    assert all(type(module).__name__ == classes[path].__name__ for path, module in own_modules(model).items())
    assert lean(model) is model
    unlean(model)
    assert {path: type(module) for path, module in own_modules(model).items()} == classes
    visadapt.eject(lean(model))
    assert not any("visadapt" in key for module in model.modules() for key in module.__dict__)
    assert all(type(module).__module__.startswith(("torch.", "torchvision.")) for module in model.modules())


def test_each_task_gets_the_norms_that_it_owns():
    model, x = injected("resnet18"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visadapt.inject(model, m=4, task="own", norms="affine", num_classes=3)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "own"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = {}
    for task in ("t", "own", None):
        with visadapt.using(model, task):
            expected[task] = model(x)
    lean(model)
    for task in ("t", "own", None):
        with visadapt.using(model, task):
            torch.testing.assert_close(model(x), expected[task], rtol=1e-9, atol=1e-10)
    with visadapt.using(model, ["own", "t"]):
        mixed = model(x)
    torch.testing.assert_close(mixed[0, :3], expected["own"][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mixed[1, :5], expected["t"][1], rtol=1e-9, atol=1e-10)
    # tasks may come and go while the model is lean
    visadapt.remove(model, "t")
    visadapt.inject(model, m=2, task="late", norms="full", num_classes=2)
    assert model(x).shape == (2, 2)


def test_a_changed_backbone_is_folded_again():
    model, x = injected("resnet18"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    lean(model)(x)
    with torch.no_grad():
        model.layer2[0].bn1.weight.mul_(1.5)
    found = model(x)
    torch.testing.assert_close(found, unlean(model)(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "settings", [((1, 1), (1, 1), (1, 1), 1), ((2, 2), (0, 0), (1, 1), 2), ((1, 1), (2, 2), (2, 2), 4)]
)
def test_frozen_conv_passes_gradcheck(settings, format):
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(memory_format=format).requires_grad_()
    weight, bias = torch.randn(8, 4 // settings[3], 3, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert gradcheck(lambda x: FrozenConv.apply(x, weight, bias, *settings), x)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_relu_and_pool_pass_gradcheck(format):
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64).to(memory_format=format).requires_grad_()
    assert gradcheck(lambda x: MaskedReLU.apply(x, False), x)
    assert gradcheck(lambda x: MaskedReLU.apply(x * 1, True), x)
    assert gradcheck(lambda x: IndexedMaxPool.apply(x, ([3, 3], [2, 2], [1, 1], [1, 1], True)), x)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5, 7), (1, 8, 4, 4), (3, 9)])
def test_bits_come_back(shape):
    for format in [torch.contiguous_format, torch.channels_last][: 2 if len(shape) == 4 else 1]:
        mask = (torch.randn(shape) > 0).contiguous(memory_format=format)
        bits = pack(mask)
        assert bits.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack(bits, mask.shape, format_of(mask)), mask)


def test_lean_composes_with_autocast_and_compile():
    model, x = injected("resnet18", dtype=torch.float32), torch.randn(2, 3, 64, 64)
    lean(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - expected).abs().max() < 0.1 * expected.abs().max()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_lean_refuses_a_plain_model():
    with pytest.raises(visadapt.VisadaptError, match="has no tasks"):
        lean(torchvision.models.resnet18())
