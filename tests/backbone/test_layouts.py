"""Series, volumes and clips: sites, adapters, mixed batches, files and merges are what they are on maps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import visadapt as v
from tests.models import stir
from tests.models_nd import NETWORKS, Member, ResNet
from visadapt import VisadaptError
from visadapt.backbone.site import WEIGHT

METHODS = {
    "bottleneck": v.Bottleneck(m=2),
    "linear-bottleneck": v.Bottleneck(m=3, activation=None),
    "depthwise": v.Bottleneck(m=3, depthwise=True),
    "series": v.Series(),
    "parallel": v.Parallel(),
    "low-rank-parallel": v.Parallel(rank=2),
    "lora": v.LoRA(r=2),
    "ssf": v.SSF(),
    "dan": v.DAN(),
    "tsa": v.TSA(),
    **{scheme: v.ConvAdapter(gamma=2, scheme=scheme) for scheme in v.methods.convadapter.SCHEMES},
}
MERGING = ("linear-bottleneck", "series", "parallel", "low-rank-parallel", "lora", "ssf", "dan", "tsa")
RESNETS = ("resnet-1d", "resnet-3d")
CASES = [
    *((name, method) for name in RESNETS for method in METHODS),
    *((name, method) for name in ("chain-1d", "video-resnet") for method in ("bottleneck", "parallel", "lora", "ssf")),
    *((name, method) for name in ("unet-1d", "unet-3d") for method in ("bottleneck", "series", "lora", "ssf")),
    *(("video-swin", method) for method in ("bottleneck", "depthwise", "ssf", "lora")),
]


def merges(name: str, method: str) -> bool:
    """Whether it does: behind an InstanceNorm, or a linear without a bias, there is no place for what it adds."""
    return method in MERGING and name in (*RESNETS, "chain-1d", "video-resnet")


def where(name: str, method: str) -> str | None:
    # Swin's windows have projections that are no modules; a clip network of any kind has linears
    return "linear" if (name, method) == ("video-swin", "lora") else None


def quietly(model: nn.Module, method: v.Method, **options) -> None:
    with warnings.catch_warnings():
        # the networks are so small that adapters are larger than what they adapt
        warnings.filterwarnings("ignore", message=".*more than the.*")
        v.inject(model, method, **options)


def injected(name: str, method: str) -> nn.Module:
    member = NETWORKS[name]
    model = member.make()
    quietly(model, METHODS[method], task="a", example=member.example(), where=where(name, method))
    stir(model, "a")
    return model


@torch.no_grad()
def answer(model: nn.Module, x: Tensor, task: str | None) -> Tensor:
    with v.using(model, task):
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layout_is_the_operators(name: str) -> None:
    member = NETWORKS[name]
    sites = [site for site in v.sites(member.make(), example=member.example()) if site.kind != WEIGHT]
    assert {site.layout for site in sites} == {member.layout}
    model = member.make()
    for site in sites:
        host = model.get_submodule(site.host)
        widths = {m.out_channels for m in host.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
        widths |= {m.num_features for m in host.modules() if isinstance(m, nn.BatchNorm3d | nn.BatchNorm1d)}
        widths |= {m.out_features for m in host.modules() if isinstance(m, nn.Linear)}
        assert not widths or site.channels in widths


@pytest.mark.parametrize(("name", "method"), CASES)
def test_identity_at_any_size_then_mixed_batches_and_files(name: str, method: str, tmp_path) -> None:
    """Of one model: finding the sites of a home-made network takes longer than all that is checked here."""
    member = NETWORKS[name]
    model = member.make()
    inputs = [member.example(), torch.randn(2, *member.wider)]
    with torch.no_grad():
        before = [model(x) for x in inputs]
    for task in ("a", "b"):
        quietly(model, METHODS[method], task=task, example=inputs[0], where=where(name, method))
    for x, expected in zip(inputs, before, strict=True):
        # TSA starts near the identity, with 1e-4 beside every 3×3 convolution
        near = 0.02 if method == "tsa" else 0.0
        torch.testing.assert_close(answer(model, x, "a"), expected, rtol=near, atol=near)

    for seed, task in enumerate(("a", "b")):
        stir(model, task, seed + 1)
    x, tasks = member.example(5), ["b", None, "a", "b", "a"]
    saved, expected = v.save(model, "a", tmp_path / "a.visadapt"), answer(model, x, "a")
    # in float64: norms over the few positions of a small network enlarge the rounding of float32 kernels
    model.double()
    exact = x.double()
    with torch.no_grad(), v.using(model, tasks):
        mixed = model(exact)
    alone = {task: answer(model, exact, task) for task in (None, "a", "b")}
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i], alone[task][i], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)

    fresh = member.make()
    v.load(fresh, saved)
    assert torch.equal(answer(fresh, x, "a"), expected)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, method in CASES if merges(name, method)])
def test_merging_is_exact(name: str, method: str) -> None:
    model, x = injected(name, method).double(), NETWORKS[name].example().double()
    model.eval()
    merged = v.merge(model, "a", probe=x)
    assert not [module for module in merged.modules() if "visadapt" in type(module).__module__]
    with torch.no_grad():
        torch.testing.assert_close(merged(x), answer(model, x, "a"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RESNETS)
def test_folding_and_lean_backbones(name: str) -> None:
    member = NETWORKS[name]
    x = member.example()
    model = injected(name, "linear-bottleneck")
    expected = answer(model, x, "a")
    folded = v.merge(model, "a", fold=True, probe=x)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
    for norms in ("affine", "frozen"):
        plain = v.inject(member.make(), v.Bottleneck(m=3), norms=norms, example=x)
        stir(plain, "default")
        light = v.lean(copy.deepcopy(plain), example=x)
        gradients = []
        for each in (plain, light):
            each.train()
            each(x).square().sum().backward()
            gradients.append([p.grad for p in v.parameters(each, "default")])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_training_reaches_both_projections() -> None:
    model, x = injected("resnet-1d", "bottleneck"), NETWORKS["resnet-1d"].example()
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in v.parameters(model, "a"))


@pytest.mark.parametrize("method", ["parallel", "lora", "dan"])
def test_a_transposed_convolution_is_refused_by_name(method: str) -> None:
    with pytest.raises(VisadaptError, match=r"up1.* is a ConvTranspose3d: no kernel .* Bottleneck or SSF"):
        v.inject(NETWORKS["unet-3d"].make(), METHODS[method], where="up1", example=NETWORKS["unet-3d"].example())


def test_a_bottleneck_stands_behind_a_transposed_convolution() -> None:
    member = NETWORKS["unet-3d"]
    (site,) = v.sites(member.make(), "up1", example=member.example())
    assert (site.channels, site.layout) == (8, "NCDHW")


class Wrapped(nn.Module):
    """A function of x as a module, so that its output can be named."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Moved(nn.Module):
    """A convolution, and something that moves its channels."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.moved = Wrapped(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.moved(self.conv(x))


@pytest.mark.parametrize(
    ("function", "layout", "channels"),
    [
        (lambda x: x, "NCHW", 6),
        (lambda x: x.permute(0, 2, 3, 1), "NHWC", 6),
        (lambda x: x.flatten(2), "NCL", 6),
        (lambda x: x.flatten(2).mT, "NLC", 6),
        (lambda x: x.mean((2, 3)), "NLC", 6),
        (lambda x: x.mean((2, 3), keepdim=True), "NCHW", 6),
        (lambda x: x.flatten(1), "NLC", 6 * 36),
        (lambda x: x.unsqueeze(2), "NCDHW", 6),
        (lambda x: x.reshape(2, 3, 2, 6, 6).transpose(1, 2).reshape(2, 6, 6, 6), "NCHW", 6),
        (lambda x: x.chunk(2, 1)[1], "NCHW", 3),
        (lambda x: torch.cat([x, x.flip(3)], 1), "NCHW", 12),
        (lambda x: torch.cat([x, x], 3), "NCHW", 6),
        (lambda x: x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 4, 5, 1).reshape(8, 9, 6), "NLC", 6),
        (lambda x: nn.functional.pixel_shuffle(torch.cat([x, x], 1), 2), "NCHW", 3),
        (lambda x: torch.einsum("nchw,oc->nhwo", x, torch.ones(4, 6)), "NHWC", 4),
        (lambda x: x[:, :, torch.arange(3)], "NCHW", 6),
        (lambda x: x.unbind(2)[0], "NCL", 6),
        (lambda x: nn.functional.instance_norm(x), "NCHW", 6),
        (lambda x: nn.functional.scaled_dot_product_attention(*[x.flatten(2).mT] * 3), "NLC", 6),
    ],
)
def test_channels_are_followed(function, layout: str, channels: int) -> None:
    (site,) = v.sites(Moved(function), "moved", example=torch.randn(2, 3, 6, 6))
    assert (site.layout, site.channels) == (layout, channels)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + x.transpose(1, 2), "is not known"),
        (lambda x: x.mean((2, 3))[:, :, None] * x.mean((2, 3))[:, None], "is not known"),
        (lambda x: x.permute(0, 2, 1, 3), r"is axis 2 of \(2, 6, 6, 6\)"),
        (lambda x: x.permute(1, 0, 2, 3), r"is axis 0"),
        (lambda x: x.reshape(2, 2, 3, 36), "is not known"),
        (lambda x: x.flatten(1).reshape(2, 4, 54), "is not known"),
        (lambda x: x.mean(1), "is not known"),
        (lambda x: torch.linalg.inv(x), "is not known"),
    ],
)
def test_channels_that_are_not_established_are_refused_by_name(function, message: str) -> None:
    model = Moved(function)
    keys = list(model.state_dict())
    with pytest.raises(VisadaptError, match=f"the channel axis of moved {message}.*where="):
        v.inject(model, m=2, where="moved", example=torch.randn(2, 3, 6, 6))
    assert list(model.state_dict()) == keys


class HalfKnown(nn.Module):
    """Two residual branches, of which the second ends where no operator shows the channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.known = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.unknown = Moved(torch.linalg.inv)
        self.unknown.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.known(x)
        return x + self.unknown(x)


def test_what_is_left_out_of_the_sites_is_named() -> None:
    model, x = HalfKnown(), torch.randn(2, 3, 6, 6)
    found = v.sites(model, example=x)
    assert [site.host for site in found if site.kind == "block"] == ["known"]
    assert "left out: the channel axis of unknown is not known" in str(found)
    for where in (None, "block"):
        with pytest.raises(VisadaptError, match=r"the channel axis of unknown is not known"):
            v.inject(model, m=2, where=where, example=x)
    assert v.tasks(v.inject(model, m=2, where="known", example=x))["default"].placements[0].sites == ("block:known",)


def test_a_shared_module_with_two_layouts_is_refused() -> None:
    class Twice(Moved):
        def forward(self, x: Tensor) -> Tensor:
            return self.moved(self.moved(self.conv(x)))

    with pytest.raises(VisadaptError, match="the channel axis of moved differs from call to call"):
        v.sites(Twice(lambda x: x.permute(0, 2, 3, 1)), "moved", example=torch.randn(2, 3, 6, 5))


class Recurrent(nn.Module):
    """A convolution, recurrent layers of both orders, and heads with a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 6)
        self.norm = nn.RMSNorm(3)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.lstm(self.conv(x).mT)
        tokens, _ = self.gru(tokens.transpose(0, 1))
        heads = self.norm(tokens.unflatten(-1, (2, 3)))
        return self.fc(heads.flatten(-2)).mean(0)


def test_recurrent_layers_and_norms_of_heads() -> None:
    model, x, names = Recurrent(), torch.randn(2, 2, 7), ["conv", "lstm", "gru", "norm"]
    found = {site.host: (site.layout, site.channels) for site in v.sites(model, names, example=x)}
    assert found == {"conv": ("NCL", 8), "lstm": ("NLC", 16), "gru": ("NLC", 6), "norm": ("NHWC", 3)}


def test_long_kernels_on_a_series_are_its_3x3_convolutions() -> None:
    class Wide(ResNet):
        def __init__(self) -> None:
            super().__init__(1)
            for layer in (self.layer1, self.layer2):
                layer[0].conv2 = nn.Conv1d(layer[0].conv2.in_channels, layer[0].conv2.out_channels, 7, padding=3)

    sites = v.sites(Wide(), "conv3x3")
    assert [site.host for site in sites] == ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]


def test_wav2vec2_s_feature_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    x = torch.randn(2, 1600)
    layers = "wav2vec2.feature_extractor.conv_layers.*.conv"
    assert {(s.layout, s.channels) for s in v.sites(model, layers, example=x)} == {("NCL", 8)}
    with torch.no_grad():
        before = model(x).logits
    v.inject(model, v.Bottleneck(m=2), where=layers, example=x, task="a", head="frozen", norms="frozen")
    with torch.no_grad():
        assert torch.equal(model(x).logits, before)
    assert {s.layout for s in v.sites(model) if s.kind in ("attention", "mlp")} == {"NLC"}


@pytest.mark.parametrize("name", ["resnet-1d", "resnet-3d", "unet-1d"])
def test_an_input_is_guessed(name: str) -> None:
    member: Member = NETWORKS[name]
    model = member.make()
    assert v.sites(model, ["layer1", "stem"] if "resnet" in name else None)
