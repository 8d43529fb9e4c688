"""Symbolic and recording tracers on injected models: torch.fx, torchvision's feature extraction, TorchScript."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import visadapt

SMALL = {
    "test_resnet": ["Bottleneck", "Series", "Parallel", "LoRA", "SSF", "ConvAdapter", "DAN", "TSA"],
    "vit_tiny_patch16_224": ["Bottleneck", "LoRA", "SSF", "AdaptFormer"],
    "test_convnext": ["Bottleneck", "SSF"],
    "test_efficientnet": ["Bottleneck", "SSF"],
    "test_byobnet": ["Bottleneck", "Parallel"],
}
OPTIONS = {"vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}}
CASES = [(name, method) for name, methods in SMALL.items() for method in methods]


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **OPTIONS.get(name, {})).eval()


def make(name: str, method: str = "Bottleneck") -> nn.Module:
    model = backbone(name)
    visadapt.inject(model, method, num_classes=3)
    return stir(model)


def stir(model: nn.Module, task: str = "default") -> nn.Module:
    with torch.no_grad():
        for parameter in visadapt.parameters(model, task):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_symbolic_trace(name, method):
    model = make(name, method)
    x = images()
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        changed = stir(model)(x)
        assert torch.equal(traced(x), changed)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_feature_extractor(name, method):
    model = make(name, method)
    x = images()
    nodes = get_graph_node_names(model)[1]
    head = next(node for node in reversed(nodes))
    extractor = create_feature_extractor(model, {head: "out"})
    with torch.no_grad():
        assert torch.equal(extractor(x)["out"], model(x))


OWN_WEIGHTS = [("vit_tiny_patch16_224", "Full"), ("vit_tiny_patch16_224", "Biases"), ("test_convnext", "TopLayers")]


@pytest.mark.parametrize(("name", "method"), CASES + OWN_WEIGHTS)
def test_a_graph_asks_for_the_task_when_it_runs(name, method):
    model = backbone(name)
    norms = "frozen" if (name, method) in OWN_WEIGHTS else "affine"
    for task in "ab":
        visadapt.inject(model, method, task=task, num_classes=3, norms=norms)
        torch.manual_seed(ord(task))
        stir(model, task)
    x = images()
    traced = torch.fx.symbolic_trace(model)
    outs = []
    with torch.no_grad():
        for task in ("b", "a", None):
            with visadapt.using(model, task):
                outs.append(traced(x))
                assert torch.equal(outs[-1], model(x))
        with (
            pytest.raises(visadapt.VisadaptError, match=r"forward|one task at a time"),
            visadapt.using(model, ["a", "b"]),
        ):
            traced(x)
    assert not torch.equal(outs[0], outs[1])
    assert outs[2].shape == (2, 4)


def test_a_task_that_a_graph_does_not_know_is_refused():
    model, x = make("vit_tiny_patch16_224", "AdaptFormer"), images()
    traced = torch.fx.symbolic_trace(model)
    visadapt.inject(model, "AdaptFormer", task="later")
    with pytest.raises(visadapt.VisadaptError, match=r"traced before task 'later' was as it is now: trace the model"):
        traced(x)
    visadapt.activate(model, "default")
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_nodes_inside_hosts_can_be_extracted():
    model = backbone("vit_tiny_patch16_224")
    visadapt.inject(model, visadapt.AdaptFormer(m=4), num_classes=3)
    stir(model)
    names = get_graph_node_names(model)[1]
    assert "blocks.1.mlp.fc1" in names
    assert create_feature_extractor(model, {"blocks.1.mlp.fc1": "f"})(images())["f"].shape[-1] == 128


def test_feature_extractor_before_and_after_inject_and_eject():
    model = backbone("test_efficientnet")
    x = images()
    before = create_feature_extractor(model, {"blocks": "f"})
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = before(x)["f"]
        visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1))
        own = create_feature_extractor(model, {"blocks": "f"})
        assert not torch.equal(own(x)["f"], expected)
        visadapt.eject(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(before(x)["f"], expected)


def test_dtypes_are_compared_when_the_graph_runs():
    model = backbone("vit_tiny_patch16_224").bfloat16()
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1))
    x = images().bfloat16()
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [torchvision.models.resnet18, lambda: backbone("vit_tiny_patch16_224")])
def test_script_is_refused_with_what_to_do(build):
    model = build().eval()
    visadapt.inject(model, visadapt.Bottleneck(m=2, activation=None), num_classes=3)
    with pytest.raises(visadapt.VisadaptError, match=r"merge.*eject.*torch\.jit\.trace"):
        torch.jit.script(model)
    torch.jit.script(visadapt.merge(model, "default"))
    torch.jit.script(visadapt.eject(model))


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "test_convnext"])
@pytest.mark.filterwarnings("ignore")
def test_record_trace(name):
    model = make(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        x = images(3)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ran", [False, True])
def test_a_batch_of_mixed_tasks_is_traced_by_export_only(ran):
    model, x = backbone("test_resnet"), images()
    for task in "ab":
        visadapt.inject(model, visadapt.Bottleneck(m=4), task=task, num_classes=3)
        stir(model, task)
    inner = model.get_submodule("layer1")
    with torch.no_grad(), visadapt.using(model, ["a", "b"]):
        if ran:
            expected = model(x)
        for name, trace in (
            ("torch.jit.trace", lambda: torch.jit.trace(model, x)),
            ("torch.jit.trace", lambda: torch.jit.trace(inner, torch.randn(2, 32, 8, 8))),
            ("torch.fx", lambda: torch.fx.symbolic_trace(model)),
        ):
            said = f"^{name} cannot trace a batch of mixed tasks: trace one task, or use torch.export$"
            with pytest.raises(visadapt.VisadaptError, match=said):
                trace()
        if ran:
            torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)
    with torch.no_grad(), visadapt.using(model, ["a", "a"]):
        # a trace has a convolution where a product is quicker: on some processors these round differently
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    visadapt.fit_decider(model, {task: [images()] for task in "ab"})
    with visadapt.using(model, "auto"), pytest.raises(visadapt.VisadaptError, match="cannot trace a batch of mixed"):
        torch.jit.trace(model, x)


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.cell = cell(16, 16, 2, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, ids):
        return self.fc(self.cell(self.embed(ids))[0][:, -1])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_hosts_are_pickled(cell, tmp_path):
    torch.manual_seed(0)
    model = Recurrent(cell).eval()
    ids = torch.randint(0, 30, (2, 5))
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), where="*", example=ids)
    assert "cell" in visadapt.tasks(model)["default"].hosts
    again = pickle.loads(pickle.dumps(model))
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    expected = model(ids)
    assert torch.equal(again(ids), expected)
    assert torch.equal(loaded(ids), expected)
    assert isinstance(again.cell, cell)
    with torch.no_grad():
        again.cell.weight_ih_l0.add_(1)
    assert not torch.equal(again(ids), expected)


def test_a_graph_is_refused_and_a_module_around_it_is_not():
    """A copy of a graph keeps the modules that it names, and neither the tasks nor the hooks of its root."""
    graph = create_feature_extractor(backbone("test_resnet"), ["layer1", "layer2"])
    assert visadapt.sites(graph, example=images()).kinds()
    with pytest.raises(visadapt.VisadaptError, match=r"a graph of torch\.fx, .* before it is traced, or on"):
        visadapt.inject(graph, m=2)
    model, x = nn.Sequential(graph).eval(), images()
    before = model(x)
    visadapt.inject(model, m=2)
    stir(model)
    with torch.no_grad():
        found, copied = model(x), copy.deepcopy(model)(x)
        assert all(torch.equal(copied[key], found[key]) for key in found)
        assert not torch.equal(found["layer2"], before["layer2"])
        found = visadapt.eject(model)(x)
    assert all(torch.equal(before[key], found[key]) for key in found)


def test_a_module_around_a_graph_is_pickled() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(torch.fx.symbolic_trace(layers), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    visadapt.inject(model, visadapt.SSF(), task="t", where="op", num_classes=3, example=x)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert visadapt.active(again) == "t"
