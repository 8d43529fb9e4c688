"""Lean frozen layers compute what plain ones do, keep less, and go away without a trace."""

import copy
from contextlib import contextmanager
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck as Bottleneck2d
from torchvision.models.resnet import ResNet
from transformers import BertConfig, BertModel

import visadapt
from tests.methods.cases import CASES
from tests.models import ZOO, output, stir
from tests.versions import compiled_whole
from visadapt import lean, sites, unlean
from visadapt.backbone.modules import own_modules
from visadapt.backbone.site import Site
from visadapt.frozen.bits import format_of, masked, pack
from visadapt.frozen.functions import (
    Activation,
    Bottleneck,
    FrozenConv,
    FrozenNorm,
    IndexedMaxPool,
    LayerNorm,
    MaskedDropout,
    MaskedReLU,
    NormInput,
    OwnBatchNorm,
)
from visadapt.methods.bottleneck import BottleneckAdapter


class Encoder(nn.Module):
    """A BERT that takes images' pixels for embeddings: what is tested of the others is tested of it."""

    def __init__(self):
        super().__init__()
        config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.bert = BertModel(config, add_pooling_layer=False)
        self.fc = nn.Linear(48, 7)

    def forward(self, x):
        return self.fc(self.bert(inputs_embeds=x.flatten(2).unfold(2, 48, 48).flatten(1, 2)[:, :32])[0].mean(1))


BACKBONES = {
    "resnet18": lambda: torchvision.models.resnet18(),
    # a block per stage: what is kept of one is kept of the others
    "resnext": lambda: ResNet(Bottleneck2d, [1, 1, 1, 1], groups=32, width_per_group=4),
    "vgg_bn": ZOO["tiny/vgg_bn"].build,
    "seresnet": lambda: timm.create_model("seresnet50", layers=(1, 1, 1, 1)),
    "efficientnet": lambda: timm.create_model("efficientnet_lite0"),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1)),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "bert": Encoder,
}


def injected(name, norms="frozen", dtype=torch.float64):
    """A copy of a model that is built once for all tests."""
    model = copy.deepcopy(built(name, norms, dtype))
    torch.manual_seed(0)
    return model


@cache
def built(name, norms, dtype):
    torch.manual_seed(0)
    model = BACKBONES[name]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # statistics and gains away from 0 and 1: a fold that forgot one of them shows
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    # an encoder of pixels does not run on an input that can be guessed
    head = "fc" if name == "bert" else "auto"
    visadapt.inject(model, m=4, task="t", num_classes=5, norms=norms, head=head)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "t"):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


@contextmanager
def saved(model, x):
    """Bytes that autograd keeps for the backward pass beside parameters, buffers and the batch, by where they lie."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def step(model, x):
    """Logits, gradients and the bytes that autograd keeps."""
    with saved(model, x) as kept:
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
    assert lean_kept < kept
    again, plain_gradients, plain_kept = step(unlean(model), x)
    assert torch.equal(again, logits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain_gradients, gradients, strict=True))
    assert plain_kept == kept


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_in_single_precision_where_no_norm_is_folded(name):
    model, x = injected(name, "affine", torch.float32), torch.randn(2, 3, 64, 64)
    logits, gradients, _ = step(model, x)
    found, lean_gradients, _ = step(lean(model), x)
    assert torch.equal(found, logits)
    for mine, theirs in zip(lean_gradients, gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_what_a_resnet50_keeps_of_full_fine_tuning():
    x = torch.randn(2, 3, 64, 64)
    model = torchvision.models.resnet50(num_classes=5).train()
    with saved(model, x) as full:
        model(x)
    for norms, widths in {
        "frozen": {None: 0.30, torch.bfloat16: 0.15},
        "affine": {None: 0.57, torch.bfloat16: 0.30},
    }.items():
        visadapt.inject(model, m=32, task=norms, num_classes=5, norms=norms)
        for keep, most in widths.items():
            with saved(lean(model.train(), keep=keep), x) as kept:
                model(x)
            assert sum(kept.values()) <= most * sum(full.values()), (norms, keep)


@pytest.mark.parametrize("norms", ["frozen", "affine"])
@pytest.mark.parametrize("name", BACKBONES)
def test_narrower_floats_are_half_the_bytes_and_hardly_another_gradient(name, norms):
    model, x = injected(name, norms, torch.float32), torch.randn(2, 3, 64, 64)
    logits, gradients, kept = step(lean(model), x)
    found, low_gradients, low_kept = step(lean(model, keep=torch.bfloat16), x)
    assert torch.equal(found, logits)
    assert low_kept < 0.9 * kept
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(low_gradients, gradients, strict=True))
    mine, theirs = (torch.cat([g.flatten() for g in each]) for each in (low_gradients, gradients))
    assert (mine - theirs).norm() < 0.02 * theirs.norm()
    again, exact_gradients, exact_kept = step(lean(model, keep=None), x)
    assert torch.equal(again, logits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(exact_gradients, gradients, strict=True))
    assert exact_kept == kept


@pytest.mark.parametrize("name", ["resnet18", "vgg_bn"])
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
@pytest.mark.parametrize("side", [7, 25])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("batch", [2, 0])
def test_the_gradient_of_a_frozen_pointwise_conv_is_that_of_torchs_own(batch, stride, side, format):
    conv = nn.Conv2d(6, 8, 1, stride).double()
    x = torch.randn(batch, 6, side, side + 1, dtype=torch.float64).to(memory_format=format).requires_grad_()
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    y = FrozenConv.apply(x, conv.weight.detach(), conv.bias.detach(), *settings)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(conv(x), x, grad)
    torch.testing.assert_close(found, wanted)
    assert batch == 0 or format_of(found) is format


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_relu_and_pool_pass_gradcheck(format):
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64).to(memory_format=format).requires_grad_()
    assert gradcheck(lambda x: MaskedReLU.apply(x, False), x)
    assert gradcheck(lambda x: MaskedReLU.apply(x * 1, True), x)
    assert gradcheck(lambda x: MaskedReLU.apply(x, False, 0.5), x)
    assert gradcheck(lambda x: IndexedMaxPool.apply(x, ([3, 3], [2, 2], [1, 1], [1, 1], True)), x)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5, 7), (1, 8, 4, 4), (3, 9)])
def test_bits_come_back(shape):
    for format in [torch.contiguous_format, torch.channels_last][: 2 if len(shape) == 4 else 1]:
        mask = (torch.randn(shape) > 0).contiguous(memory_format=format)
        bits = pack(mask.clone())
        assert bits.numel() == -(-mask.numel() // 8)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype).contiguous(memory_format=format)
            assert torch.equal(masked(x, bits, mask.shape, format_of(mask)), x.where(mask, torch.zeros_like(x)))


def test_masked_lets_through_what_the_mask_says():
    x = torch.tensor([1.0, -2.0, torch.inf, torch.nan])
    bits = pack(torch.tensor([True, True, False, False]))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = masked(x.to(dtype), bits, x.shape, torch.contiguous_format)
        assert torch.equal(found, torch.tensor([1.0, -2.0, 0.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("layout", ["NCHW", "large", "NHWC", "NLC"])
@pytest.mark.parametrize("activation", ["gelu", "relu", None])
def test_bottleneck_passes_gradcheck(layout, activation):
    shape = {"NCHW": (2, 6, 3, 3), "large": (1, 6, 12, 11), "NHWC": (2, 3, 3, 6), "NLC": (2, 5, 6)}[layout]
    layout = layout.replace("large", "NCHW")
    method = visadapt.Bottleneck(m=4, activation=activation, init_std=1.0)
    adapter = BottleneckAdapter(method, Site("at", "block", 6, layout, 0)).double()
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    assert torch.equal(Bottleneck.apply(h, adapter, h.dtype, None, *weights), adapter(h))
    assert gradcheck(lambda h, *weights: Bottleneck.apply(h, adapter, h.dtype, None, *weights), (h, *weights))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 6, 6)])
def test_dropout_draws_what_torchs_own_draws(shape):
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    found = []
    for function in (lambda x: F.dropout(x, 0.3), lambda x: MaskedDropout.apply(x, 0.3)):
        torch.manual_seed(0)
        y = function(x)
        found.append((y, *torch.autograd.grad(y, x, grad), torch.rand(3)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def source_of(x, weight, bias, mean, var):
    return NormInput(x.detach(), weight.detach(), bias.detach(), mean, var, 1e-5, x.dtype)


def test_norms_and_activations_pass_gradcheck():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    norm = nn.BatchNorm2d(3).double().eval()
    norm.running_mean, norm.running_var = mean, var
    assert gradcheck(lambda x: FrozenNorm.apply(x, norm.requires_grad_(False)), x)
    assert gradcheck(lambda *a: OwnBatchNorm.apply(*a, source_of(*a, mean, var)), (x, weight, bias))
    last = x.flatten(2).transpose(1, 2)
    assert gradcheck(lambda *a: LayerNorm.apply(*a, (3,), 1e-5, x.dtype), (last, weight, bias))
    assert gradcheck(lambda x: Activation.apply(x, F.silu, x.dtype), x)


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (2, 6, 3, 3)), ("NHWC", (2, 3, 3, 6)), ("NLC", (2, 5, 6))])
def test_what_follows_a_bottleneck_may_write_to_its_output(layout, shape):
    adapter = BottleneckAdapter(visadapt.Bottleneck(m=4, init_std=1.0), Site("at", "block", 6, layout, 0))
    weights = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    h = torch.randn(shape)
    y = Bottleneck.apply(h, adapter, h.dtype, None, *weights).relu_()
    plain = adapter(h).relu()
    assert torch.equal(y, plain)
    found, wanted = (torch.autograd.grad(out.square().sum(), weights) for out in (y, plain))
    torch.testing.assert_close(found, wanted)


def test_a_lean_bottleneck_behind_a_linear_computes_without_autograd():
    """There the output of the linear is nobody else's, and the adapter is told that it may write to it."""
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval(), torch.randn(2, 3, 32, 32)
    visadapt.inject(model, m=4, task="t", num_classes=3, where="module:blocks.*.mlp.fc2")
    stir(model, "t")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(lean(model)(x), expected)


def test_a_norms_output_is_kept_by_nobody():
    adapter = BottleneckAdapter(visadapt.Bottleneck(m=1), Site("at", "block", 8, "NCHW", 0))
    x, weight = torch.randn(2, 8, 16, 16), torch.ones(8, requires_grad=True)
    weights = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    with saved(adapter, x) as kept:
        source = source_of(x * 2, weight, weight, torch.zeros(8), torch.ones(8))
        h = OwnBatchNorm.apply(source.x, weight, weight, source)
        Bottleneck.apply(h, adapter, h.dtype, source, *weights).sum().backward()
    assert sum(kept.values()) < 1.5 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("norms", ["frozen", "affine"])
def test_tasks_that_come_later_are_lean_as_well(norms):
    model, x = injected("resnet18"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visadapt.inject(model, m=4, task="t2", num_classes=5, norms=norms)
    late = lean(injected("resnet18"))
    visadapt.inject(late, m=4, task="t2", num_classes=5, norms=norms)
    late.load_state_dict(lean(model).state_dict())
    mine, theirs = (step(visadapt.activate(each, "t"), x)[2] for each in (late, model))
    assert mine == theirs
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in late.modules()] == classes
    unlean(model)
    assert not any("_visadapt_lean" in module.__dict__ for module in model.modules())


def test_a_copy_is_lean_for_itself():
    model, x = lean(injected("resnet18", "affine")), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    clone = copy.deepcopy(model)
    kept = step(clone, x)[2]
    unlean(model)
    assert step(clone, x)[2] == kept < step(model, x)[2]
    low = lean(copy.deepcopy(clone), keep=torch.float32)
    assert step(low, x)[2] < kept == step(clone, x)[2]


@pytest.mark.parametrize("norms", ["frozen", "affine"])
def test_lean_composes_with_autocast(norms):
    model, x = injected("resnet18", norms, torch.float32), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients, kept = step(model, x)
        _, lean_gradients, lean_kept = step(lean(model), x)
    mine, theirs = (torch.cat([g.flatten() for g in each]) for each in (lean_gradients, gradients))
    assert mine.dtype == torch.float32
    assert (mine - theirs).norm() < 0.1 * theirs.norm()
    assert lean_kept < 0.7 * kept


@pytest.mark.parametrize("name", ["seresnet", "vit", "bert"])
def test_lean_composes_with_computing_again(name):
    """The backbone's own checkpointing: what lies between its marks is computed once more in backward, not kept."""
    model, x = injected(name, "affine"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    _, gradients, _ = step(model, x)
    lean(model.train())
    if name == "bert":
        # its name until transformers 5
        enable = (
            getattr(model.bert, "activation_checkpointing_enable", None) or model.bert.gradient_checkpointing_enable
        )
        enable()
    else:
        model.set_grad_checkpointing()
    calls = []
    model.get_submodule(sites(model)[0].host).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _, found, _ = step(model, x)
    assert len(calls) == 2
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def test_lean_composes_with_compile():
    model, x = injected("resnet18", dtype=torch.float32), torch.randn(2, 3, 64, 64)
    expected = lean(model)(x)
    compiled = compiled_whole(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_lean_refuses_a_plain_model():
    with pytest.raises(visadapt.VisadaptError, match="has no tasks"):
        lean(torchvision.models.resnet18())


@pytest.mark.parametrize("keep", ["bfloat16", torch.int8, 16])
def test_lean_refuses_what_cannot_keep_floats(keep):
    model = injected("resnet18")
    with pytest.raises(visadapt.VisadaptError, match=r"torch\.bfloat16"):
        lean(model, keep=keep)
    assert not any("_visadapt_lean" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("member", "case"),
    [(m, c) for m in ("tiny/resnet", "transformers/bert") for c in CASES if CASES[c].suits(ZOO[m])],
)
def test_what_a_task_trains_of_the_backbone_is_not_taken_for_frozen(member, case):
    model, inputs = ZOO[member].make().double(), ZOO[member].inputs()
    if "x" in inputs:
        inputs = {"x": inputs["x"].double()}
    CASES[case].put(model, "t")
    stir(model, "t")

    def learn():
        torch.manual_seed(5)  # of dropout and drop path; at this seed no sample's branch is dropped everywhere
        logits = output(model, inputs)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), visadapt.parameters(model, "t"))

    logits, gradients = learn()
    for keep, close in ((None, {"rtol": 1e-7, "atol": 1e-10}), (torch.float32, {"rtol": 1e-4, "atol": 1e-5})):
        lean(model, keep=keep)
        found, lean_gradients = learn()
        unlean(model)
        torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-10)
        for mine, theirs in zip(lean_gradients, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, **close)
