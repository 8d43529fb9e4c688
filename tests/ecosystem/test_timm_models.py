"""What timm's own tests ask of a model, asked of small injected models of many families."""

import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer, get_graph_node_names

import visadapt

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "test_byobnet": {},
    "test_convnext": {},
    "test_convnext2": {},
    "test_efficientnet": {},
    "test_efficientnet_evos": {},
    "test_efficientnet_gn": {},
    "test_mambaout": {},
    "test_nfnet": {},
    "test_resnet": {},
    "test_vit": {},
    "test_vit_relpos": {},
    "vit_tiny_patch16_224": VIT,
    "mobilenetv3_small_050": {},
    "resnet10t": {},
    "regnetx_002": {},
}
every = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:the .* has .* parameters, more than")


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **MODELS[name], **options).eval()
    return visadapt.inject(model, visadapt.Bottleneck(m=2, init_std=0.05), num_classes=3)


def images(name: str, n: int = 2) -> torch.Tensor:
    side = MODELS[name].get("img_size", 160 if name.startswith("test_") else 64)
    return torch.randn(n, 3, side, side)


@every
def test_forward_and_backward(name):
    model = make(name).train()
    out = model(images(name))
    assert out.shape == (2, 3)
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "default"))
    assert all(p.grad is None for n, p in model.named_parameters() if ".visadapt." not in n)


@every
def test_features_and_head_in_two_steps(name):
    model = make(name)
    x = images(name)
    with torch.no_grad():
        expected = model(x)
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), expected)
        assert model.num_features in features.shape
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)


@every
def test_intermediates(name):
    model = make(name)
    x = images(name)
    with torch.no_grad():
        final, steps = model.forward_intermediates(x)
        assert steps
        assert torch.equal(final, model.forward_features(x))
        only = model.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(one, other) for one, other in zip(only, steps, strict=True))


@every
def test_feature_lists(name):
    torch.manual_seed(0)
    layers = {"out_indices": (0, 1)} if MODELS[name] else {}
    model = timm.create_model(name, features_only=True, **layers, **MODELS[name]).eval()
    x = images(name)
    with torch.no_grad():
        expected = model(x)
        visadapt.inject(model, m=2)
        found = model(x)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        for parameter in visadapt.parameters(model, "default"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
        assert not torch.equal(model(x)[-1], expected[-1])
        visadapt.eject(model)
        assert torch.equal(model(x)[-1], expected[-1])
    widths = [info["num_chs"] for info in model.feature_info.get_dicts()]
    assert all(width in each.shape[1:] for width, each in zip(widths, found, strict=True))


@every
def test_symbolic_trace_as_timm_does_it(name):
    model = make(name)
    x = images(name)
    options = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    last = get_graph_node_names(model, tracer_kwargs=options)[1][-1]
    extractor = create_feature_extractor(model, {last: "out"})
    with torch.no_grad():
        assert torch.equal(extractor(x)["out"], model(x))


@every
def test_settings_of_the_model(name):
    model = make(name)
    assert model.num_classes == 4
    assert model.get_classifier() is not None
    assert model.default_cfg["classifier"]
    model.set_grad_checkpointing(True)
    x = images(name)
    with torch.no_grad():
        expected = model(x)
    visadapt.eject(model)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert expected.shape == (2, 3)


MORE = [
    "test_coatnet",
    "test_convnext3",
    "test_efficientnet_ln",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "ghostnet_050",
    "lcnet_035",
    "mnasnet_small",
    "mobilenetv2_035",
    "mobilenetv4_conv_small_035",
    "tinynet_e",
    "regnety_002",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "efficientvit_b0",
    "repghostnet_050",
    "fastvit_t8",
    "starnet_s1",
    "repvit_m0_9",
    "poolformerv2_s12",
    "resnet14t",
    "resnet18d",
    "seresnet18",
    "legacy_seresnet18",
    "skresnet18",
    "darknet17",
    "ese_vovnet19b_dw",
    "dla46_c",
    "convnext_atto",
    "convnextv2_atto",
    "gernet_s",
    "repvgg_a0",
    "rexnet_100",
    "fbnetc_100",
    "spnasnet_100",
    "semnasnet_050",
    "hgnetv2_b0",
    "inception_next_atto",
    "mobilenet_edgetpu_v2_xs",
    "dpn48b",
    "mobilenetv1_100",
    "efficientnet_lite0",
    "nf_resnet26",
    "eca_resnext26ts",
    "shvit_s1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_many_architectures(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    for task in "ab":
        visadapt.inject(model, visadapt.Bottleneck(m=2, init_std=0.05), task=task, num_classes=3)
    x = torch.randn(2, 3, 160, 160) if name.startswith("test_") else torch.randn(2, 3, 64, 64)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "b"))
    model.eval()
    with torch.no_grad():
        expected = model(x)
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), expected)
        if hasattr(model, "forward_intermediates"):
            assert torch.equal(model.forward_intermediates(x)[0], features)
        # one trace; create_feature_extractor, which makes two and needs two for the names, is tested above
        tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
        assert torch.equal(fx.GraphModule(model, tracer.trace(model))(x), expected)
        with visadapt.using(model, "a"):
            other = model(x)
        with visadapt.using(model, ["a", "b"]):
            for found in (model(x), model.forward_head(model.forward_features(x))):
                torch.testing.assert_close(found, torch.stack([other[0], expected[1]]), rtol=1e-4, atol=1e-4)
        visadapt.eject(model)
        model.reset_classifier(0)
        assert len(model(x)) == 2
