"""Adapters leave alone what the hooks of other libraries hold: full backward hooks, gradients per sample, features."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import visadapt
from tests.versions import compiled_whole
from visadapt.methods.layers import is_output_hooked

# of torch, about modules whose input is the image and parts that return weights
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called"),
]

METHODS = {
    "resnet": ["Bottleneck", "Series", "Parallel", "LoRA", "SSF", "ConvAdapter", "DAN", "TSA"],
    "vit": ["Bottleneck", "LoRA", "SSF", "AdaptFormer"],
    "convnext": ["Bottleneck", "SSF"],
}
CASES = [(kind, method) for kind, methods in METHODS.items() for method in methods]


class Residual(nn.Module):
    """A block without in-place operators, which torch refuses beside full backward hooks."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 32, 3, 2, 1), nn.Sequential(Residual(32), Residual(32))
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def backbone(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "resnet":
        return PlainNet().eval()
    if kind == "vit":
        options = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=4, **options).eval()
    return timm.create_model("test_convnext", num_classes=4).eval()


def make(kind: str, method: str) -> nn.Module:
    model = backbone(kind)
    visadapt.inject(model, method, num_classes=3)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "default"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(visadapt.parameters(model, "default"))
    return list(torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_full_backward_hooks_on_every_module_change_nothing(kind, method, lean):
    model = make(kind, method)
    if lean:
        visadapt.lean(model)
    x = torch.randn(2, 3, 32, 32)
    expected = gradients(model, x)
    seen = set()
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda *args, name=name: seen.add(name))
    found = gradients(model, x)
    for own, other in zip(expected, found, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(other, own)
    if method == "Bottleneck":
        assert any(name.endswith("bottleneck.up") for name in seen)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_what_forward_hooks_keep_is_not_changed_afterwards(kind, method, grad):
    model = make(kind, method)
    kept = []
    for name, module in model.named_modules():
        if ".visadapt." in name:
            module.register_forward_hook(
                lambda module, args, out: kept.append(
                    (out, out.detach().clone() if isinstance(out, torch.Tensor) else None)
                )
            )
    with torch.set_grad_enabled(grad):
        model(torch.randn(2, 3, 32, 32))
    tensors = [(now, then) for now, then in kept if isinstance(now, torch.Tensor)]
    assert tensors or method in ("DAN", "ConvAdapter")
    assert all(torch.equal(now, then) for now, then in tensors)


def test_hooks_for_all_modules_are_seen():
    adapter = nn.Linear(2, 2)
    assert not is_output_hooked(adapter)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    assert is_output_hooked(adapter)
    handle.remove()
    assert not is_output_hooked(adapter)


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_per_sample_by_hooks(kind):
    """The way of Opacus: a forward hook keeps the input, a full backward hook multiplies it with the gradient."""
    model = backbone(kind)
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1))
    ups = [m for n, m in model.named_modules() if n.endswith("bottleneck.up")]
    inputs, found = {}, {}

    def multiply(module, grad_input, grad_output):
        g, a = grad_output[0], inputs[module]
        g, a = (g.flatten(2), a.flatten(2).mT) if module.layout == "NCHW" else (g.flatten(1, -2).mT, a.flatten(1, -2))
        found[module] = g @ a

    for up in ups:
        up.register_forward_hook(lambda module, args, out: inputs.update({module: args[0].detach()}))
        up.register_full_backward_hook(multiply)
    model(torch.randn(3, 3, 32, 32)).sum().backward()
    for up in ups:
        torch.testing.assert_close(found[up].sum(0), up.weight.grad, rtol=1e-4, atol=1e-5)


def test_compile_after_hooks_were_looked_at():
    model = torchvision.models.resnet18().eval()
    visadapt.inject(model, visadapt.Bottleneck(m=2, init_std=0.1))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        found = compiled_whole(model, backend="eager")(x)
    torch.testing.assert_close(found, expected)
