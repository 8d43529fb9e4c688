"""A lean model gives what a plain one gives, and shows what a plain one shows, whatever is done to it meanwhile."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import visadapt
from tests.models import enliven, stir
from visadapt import VisadaptError, lean, unlean, using
from visadapt.backbone.batchnorm import find_pairs
from visadapt.frozen.checksums import Checksums

NETWORKS = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=4, channels=(8, 16, 24, 32)),
    "densenet": lambda: timm.create_model("densenet121", num_classes=4, growth_rate=4, block_config=(1, 2, 2)),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=4),
    "regnet": lambda: timm.create_model("regnetx_002", num_classes=4),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=4, dims=(8, 16, 24, 32)),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2),
}


def injected(name="resnet", norms="frozen", dtype=torch.float64):
    torch.manual_seed(0)
    model = enliven(NETWORKS[name]()).to(dtype)
    visadapt.inject(model, m=4, task="t", num_classes=3, norms=norms)
    stir(model, "t")
    return model


def images(dtype=torch.float64, n=3, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model, x):
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), visadapt.parameters(model, "t"))]


def agree(found, expected, rtol=1e-7):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= rtol * theirs.norm() + 1e-12


@pytest.mark.parametrize("norms", ["frozen", "affine"])
@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenetv2", "regnet", "convnext", "vit"])
def test_timms_checkpointing(name, norms):
    model, x = injected(name, norms), images()
    expected = gradients(model.train(), x) if name != "vit" else gradients(model, x)
    model.set_grad_checkpointing()
    agree(gradients(lean(model), x), expected)
    agree(gradients(lean(model, keep=torch.float32), x), expected, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norms", ["frozen", "affine"])
def test_a_checkpoint_around_the_model(norms, reentrant):
    model, x = injected("resnet", norms), images().requires_grad_(reentrant)
    expected = gradients(model, x)
    lean(model)

    def learn():
        out = checkpoint(model, x, use_reentrant=reentrant)
        for p in visadapt.parameters(model, "t"):
            p.grad = None
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in visadapt.parameters(model, "t"))]

    agree(learn(), expected)


@pytest.mark.parametrize("norms", ["frozen", "affine"])
def test_saved_tensors_that_are_offloaded(norms):
    model, x = injected("resnet", norms), images()
    expected = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        agree(gradients(lean(model), x), expected)


def _scaled(model):
    model.layer1[0].conv1.weight.data.mul_(1.5)


def _one_filter(model):
    model.layer2[1].conv2.weight.data[3] = 0


def _swapped(model):
    data = model.layer1[0].conv1.weight.data
    data.copy_(data.flip(0))


def _set(model):
    for _ in range(3):  # an address may be used again
        model.conv1.weight.data = torch.randn(model.conv1.weight.shape, dtype=torch.float64)


def _statistics(model):
    model.bn1.running_var.data.mul_(3)


def _affine(model):
    model.layer3[0].bn2.bias.data[5] += 1


def _loaded(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def _by_numpy(model):
    model.layer1[1].conv2.weight.detach().numpy()[2, 1] = 0.3


def _new_parameter(model):
    model.layer4[0].conv1.weight = nn.Parameter(model.layer4[0].conv1.weight.detach() * 2, requires_grad=False)


CHANGES = [_scaled, _one_filter, _swapped, _set, _statistics, _affine, _loaded, _by_numpy, _new_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change(change):
    model, x = injected(), images()
    lean(model)
    before = gradients(model, x)
    change(model)
    found = gradients(model, x)
    expected = gradients(unlean(model), x)
    agree(found, expected)
    assert (before[0] - expected[0]).norm() > 1e-6 * expected[0].norm()


@pytest.mark.parametrize("folds", [True, False])
def test_weights_that_change_between_forward_and_backward(folds):
    """The gradient is that of what was computed, or torch's own error."""
    model, x = injected(), images()
    expected = gradients(model, x)
    lean(model)
    if not folds:
        model.layer4[0].conv1.register_forward_hook(lambda *_: None)
    out = model(x)
    with torch.no_grad():
        model.layer4[0].conv1.weight.mul_(2)
        model.layer4[0].bn1.weight.mul_(2)
    if folds:
        agree(torch.autograd.grad(out.square().sum(), visadapt.parameters(model, "t")), expected[1:])
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.square().sum().backward()


def watched(model, way):
    """What hooks see at every conv and norm in a forward and backward."""
    seen, handles, register = [], [], REGISTER[way]
    # torch refuses what is done in place behind a full backward hook, as behind a ResNet's norms
    kinds = nn.Conv2d if way == "backward" else (nn.Conv2d, nn.BatchNorm2d)
    for path, module in model.named_modules():
        if isinstance(module, kinds) and "visadapt" not in path:
            handles.append(register(module, lambda m, *a: seen.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1])))
    x = images().requires_grad_()
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    return [t.detach().clone() for t in seen]


REGISTER = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda m, i, o: hook(m, o)),
}


@pytest.mark.parametrize("way", REGISTER)
@pytest.mark.parametrize("first", [True, False])
def test_hooks_see_what_they_would_see(way, first):
    model = injected()
    expected = watched(model, way)
    lean(model)
    if first:
        model(images())
    agree(watched(model, way), expected)
    # and it folds again when they are gone
    assert model.__dict__["_visadapt_lean"].weights()


def test_a_hook_that_changes_something_and_one_for_all_modules():
    model, x = injected(), images()
    lean(model)
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: out * 2 + 1)
    found = gradients(model, x)
    agree(found, gradients(unlean(model), x))
    lean(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out.detach()) if isinstance(module, nn.Conv2d) else None
    )
    try:
        model(x)
        mine = list(seen)
        seen.clear()
        unlean(model)(x)
    finally:
        handle.remove()
    agree(mine, seen)


def test_a_module_called_by_itself_gives_what_it_always_gave():
    model, x = injected(), images()
    with torch.no_grad():
        expected = model.bn1(model.conv1(x)), model.conv1(x), model.forward_features(x)
        lean(model)(x)
        agree([model.bn1(model.conv1(x)), model.conv1(x), model.forward_features(x)], expected)
        agree([model.bn1(expected[1])], [expected[0]])
        agree([nn.Sequential(model.conv1, model.bn1)(x)], [expected[0]])


def test_features_taken_out_by_torchvision():
    model = visadapt.inject(enliven(torchvision.models.resnet18()).double().eval(), m=2, task="t", norms="frozen")
    stir(model, "t")
    x = images()
    take = torchvision.models.feature_extraction.create_feature_extractor
    expected = take(model, ["layer1.0.conv1", "layer2.0.bn1"])(x)
    lean(model)(x)
    found = take(model, ["layer1.0.conv1", "layer2.0.bn1"])(x)
    agree(found.values(), expected.values())


@pytest.mark.parametrize("norms", ["frozen", "affine"])
@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit"])
def test_inference_mode_then_training(name, norms):
    model, x = injected(name, norms), images()
    expected = gradients(model, x)
    with torch.inference_mode():
        first = lean(model)(x.clone())
    agree([first], expected[:1])
    agree(gradients(model, x), expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_gives_gradients_as_exact_as_without_lean(name, inside):
    """Backward within the autocast block or behind it."""
    model, x = injected(name, "frozen", torch.float32), images(torch.float32, n=8)
    exact = gradients(copy.deepcopy(model).double(), x.double())

    def learn():
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            if inside:
                return torch.autograd.grad(out.float().square().sum(), visadapt.parameters(model, "t"))
        return torch.autograd.grad(out.float().square().sum(), visadapt.parameters(model, "t"))

    def error(found):
        mine, theirs = (torch.cat([g.flatten().double() for g in each]) for each in (found, exact[1:]))
        return float((mine - theirs).norm() / theirs.norm())

    plain = error(learn())
    lean(model)
    assert error(learn()) <= 1.5 * plain + 1e-3


def test_a_dtype_that_the_plain_model_refuses_is_refused():
    model = lean(injected("resnet", "frozen", torch.float32))
    with pytest.raises(RuntimeError):
        model(images())
    model(images(torch.float32))
    model.double()
    agree([model(images())], [unlean(model)(images())])


class Twice(nn.Module):
    """Outputs that something else than the norm may see."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.way = way

    def forward(self, x):
        y = self.conv(x)
        if self.way == "attribute":
            self.seen = [y]
        if self.way == "branch" and self.training:
            return self.fc(y.mean((2, 3)))
        z = self.fc(self.norm(y).relu().mean((2, 3)))
        return (z, y) if self.way == "returned" else {"z": z, "y": {"y": y}} if self.way == "dict" else z


@pytest.mark.parametrize("way", ["attribute", "returned", "dict"])
def test_a_conv_whose_output_leaves_the_forward_is_not_folded(way):
    model = enliven(Twice(way)).eval()
    assert find_pairs(model, images(torch.float32)) == []


def test_a_path_that_was_not_taken_before_is_refused():
    model, x = enliven(Twice("branch")).eval(), images(torch.float32)
    visadapt.inject(model, visadapt.Linear(), task="t", num_classes=2, norms="frozen")
    assert find_pairs(model, x) == [("conv", "norm")]
    lean(model, example=x)
    expected = model(x)
    with pytest.raises(VisadaptError, match="something else than the norm"):
        model.train()(x)
    torch.testing.assert_close(model.eval()(x), expected)
    unlean(model.train())(x)


def test_tied_weights_are_folded_each_for_itself():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.b.weight = self.a.weight
            self.stem, self.na, self.nb = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.nb(self.b(self.na(self.a(self.stem(x))).relu())).relu().mean((2, 3)))

    model, x = enliven(Tied()).double().eval(), images()
    visadapt.inject(model, m=2, task="t", where="stem", norms="frozen", example=x)
    stir(model, "t")
    expected = gradients(model, x)
    agree(gradients(lean(model, example=x), x), expected)


def test_tasks_that_share_a_lean_model():
    model, x = injected(), images()
    visadapt.inject(model, visadapt.LoRA(r=2), task="lora", where="layer1.*.conv1", norms="frozen", num_classes=3)
    visadapt.inject(model, visadapt.Biases(), task="biases", norms="frozen", num_classes=3)
    expected = {}
    for task in ("lora", "biases"):
        stir(model, task)
    for task in ("t", "lora", "biases", None, ("lora", "t", "biases")):
        with using(model, task), torch.no_grad():
            expected[task] = model(x)
    lean(model)
    for task in (*expected, *reversed(expected)):
        with using(model, task), torch.no_grad():
            agree([model(x)], [expected[task]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (), (0,), (100, 101), (64, 32, 3, 3), (5, 7, 11, 13)])
def test_checksums_see_every_value(dtype, shape):
    x = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert Checksums([x, x]) == Checksums([x.clone(), x.clone()])
    for index in range(0, x.numel(), max(1, x.numel() // 7)):
        other = x.clone()
        other.data.view(-1)[index] = 101
        assert Checksums([other, x]) != Checksums([x, x])
    assert Checksums([x]) != Checksums([x.double() if dtype != torch.float64 else x.float()])
    if len(shape) == 4:
        last = x.to(memory_format=torch.channels_last)
        assert Checksums([last]) == Checksums([last.clone()])
        assert Checksums([last]) != Checksums([torch.where(last == last.max(), 101, last).to(dtype)])


def test_checksums_see_order_and_addresses_that_are_not_aligned():
    flat = torch.arange(20_001.0)
    tensor = flat[1:]
    assert Checksums([tensor]) == Checksums([tensor.clone()])
    assert Checksums([tensor]) != Checksums([tensor.flip(0)])
    assert Checksums([tensor]) != Checksums([-tensor])
    assert Checksums([tensor]) != Checksums([tensor.view(2, -1)])
