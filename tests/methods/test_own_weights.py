"""Full, TopLayers and Biases: tasks with their own copies of the backbone's weights."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visadapt as v
from tests.models import ZOO, answer, output, stir


@pytest.mark.parametrize("name", ["tiny/resnet", "tiny/vgg_bn", "transformers/bert"])
def test_full_is_ordinary_fine_tuning(name) -> None:
    """The same losses, step by step, and the same weights in the end as a copy trained without visadapt."""
    member = ZOO[name]
    plain, model = member.make(), member.make()
    v.inject(model, v.Full(), norms="full", head="copy")
    inputs = member.inputs(n=4)
    losses = {}
    for key, net, parameters in (("plain", plain, plain.parameters()), ("task", model, v.parameters(model))):
        torch.manual_seed(1)
        optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        net.train()
        losses[key] = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(output(net, inputs), torch.arange(4) % member.width)
            loss.backward()
            optimiser.step()
            losses[key].append(loss.item())
    assert losses["task"] == losses["plain"]
    plain.eval()
    with torch.no_grad():
        assert torch.equal(answer(model, inputs, "default"), output(plain, inputs))
    assert losses["task"][0] != losses["task"][-1]


def test_full_owns_all_but_norms_and_head(tiny) -> None:
    signature = inspect.signature(tiny.forward)
    v.inject(tiny, v.Full(), num_classes=4, norms="frozen")
    assert inspect.signature(tiny.forward) == signature
    own = {name.removeprefix("full.") for name, _ in v.named_parameters(tiny, "default") if name.startswith("full.")}
    bare = {n for n, _ in tiny.named_parameters() if "visadapt" not in n}
    assert own == {n for n in bare if ".bn" not in f".{n}" and "downsample.1" not in n and not n.startswith("fc.")}


def test_biases_are_bitfit(tiny) -> None:
    bert = ZOO["transformers/bert"].make()
    v.inject(bert, v.Biases(), norms="frozen")
    own = {
        name.removeprefix("biases.") for name, _ in v.named_parameters(bert, "default") if name.startswith("biases.")
    }
    bare = {n for n, _ in bert.named_parameters() if "visadapt" not in n}
    assert own == {n for n in bare if n.endswith("bias") and not n.startswith("classifier")}
    v.inject(bert, v.Biases(), norms="affine", task="affine")
    own = [name for name, _ in v.named_parameters(bert, "affine") if name.startswith("biases.")]
    assert own
    assert not any("LayerNorm" in name for name in own)
    # a ResNet's only biases are its norms'
    v.inject(tiny, v.Biases(), norms="frozen", head="frozen")
    assert v.summary(tiny)["default"].adapters == sum(
        m.bias.numel() for m in tiny.modules() if isinstance(m, nn.BatchNorm2d)
    )
    with pytest.raises(v.VisadaptError, match="no such parameters beside its norms"):
        v.inject(tiny, v.Biases(), task="affine")


@pytest.mark.parametrize("n", [1, 3, 8])
def test_top_layers(tiny, n) -> None:
    v.inject(tiny, v.TopLayers(n), norms="frozen", head="frozen")
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)][-n:]
    assert {".".join(host.split(".")[:2]) for host in v.tasks(tiny)["default"].hosts} == set(blocks)
    convs = sum(
        p.numel() for b in blocks for p in tiny.get_submodule(b).parameters() if p.ndim == 4 and not p.requires_grad
    )
    assert v.summary(tiny)["default"].adapters == convs


def test_top_layers_of_others() -> None:
    vgg = v.inject(ZOO["tiny/vgg_bn"].make(), v.TopLayers(2), norms="frozen", head="frozen")
    convs = [n for n, m in vgg.named_modules() if isinstance(m, nn.Conv2d)]
    assert v.tasks(vgg)["default"].hosts == convs[-2:]
    bert = v.inject(ZOO["transformers/bert"].make(), v.TopLayers(1), norms="frozen", head="frozen")
    assert all(host.startswith("bert.encoder.layer.1.") for host in v.tasks(bert)["default"].hosts)
    # of the sites that where= names, the top ones
    v.inject(bert, v.TopLayers(1), where=range(1), task="first", norms="frozen", head="frozen")
    assert all(host.startswith("bert.encoder.layer.0.") for host in v.tasks(bert)["first"].hosts)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.inner = nn.Linear(4, 4)
            self.decode = nn.Linear(4, 7, bias=False)
            self.decode.weight = self.embed.weight

        def forward(self, x):
            return self.decode(self.inner(self.embed(x)))

    model = Tied()
    x = torch.arange(7)[None]
    before = model(x)
    v.inject(model, v.Full(), norms="frozen")
    assert [n for n, _ in v.named_parameters(model, "default")] == [
        "full.embed.weight",
        "full.inner.weight",
        "full.inner.bias",
    ]
    assert torch.equal(model(x), before)
    stir(model, "default")
    own = dict(v.named_parameters(model, "default"))
    expected = F.linear(
        F.linear(own["full.embed.weight"], own["full.inner.weight"], own["full.inner.bias"]), own["full.embed.weight"]
    )
    torch.testing.assert_close(model(x)[0], expected)


def test_weights_that_are_read_without_a_call() -> None:
    """A child whose weight its parent reads, as torch's attention does, is the task's as well."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    v.inject(model, v.Full(), norms="frozen")
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in v.parameters(model))


def test_half_precision() -> None:
    model = ZOO["tiny/resnet"].make().to(torch.bfloat16)
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    before = answer(model, {"x": x})
    for i, method in enumerate((v.Full(), v.TopLayers(2), v.DAN(), v.LoRA(r=2), v.Parallel(), v.SSF())):
        v.inject(model, method, task=f"t{i}", norms="affine", head="frozen")
        # the task's norms compute in fp32
        torch.testing.assert_close(answer(model, {"x": x}, f"t{i}"), before, rtol=0.1, atol=0.1)
        assert {p.dtype for p in v.parameters(model, f"t{i}")} == {torch.float32}
        with v.using(model, f"t{i}"):
            model(x).sum().backward()
        assert all(p.grad is not None for p in v.parameters(model, f"t{i}"))


def test_copies_and_classes(tiny, image) -> None:
    plain = type(tiny)
    v.inject(tiny, v.Full())
    stir(tiny, "default")
    assert isinstance(tiny, plain)
    copied = copy.deepcopy(tiny)
    expected = answer(tiny, {"x": image}, "default")
    stir(tiny, "default", seed=5)
    assert torch.equal(answer(copied, {"x": image}, "default"), expected)
    v.eject(tiny)
    assert type(tiny) is plain


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (v.Linear(), {"norms": "affine", "num_classes": 3}, "pass norms='frozen', or Norms"),
        (v.Linear(), {"norms": "frozen"}, "give num_classes="),
        (
            v.Linear(),
            {"norms": "frozen", "num_classes": 3, "where": "block"},
            "Linear adds nothing at sites: leave where= out",
        ),
        (v.Norms(), {"norms": "frozen"}, "'affine' or 'full'"),
        (v.Norms(), {"where": "block"}, "Norms adds nothing at sites: leave where= out"),
        (v.Full(), {"where": "layer1"}, "Full adds nothing at sites: leave where= out"),
        (v.Biases(), {"where": "layer1"}, "Biases adds nothing at sites: leave where= out"),
        (v.TopLayers(9), {}, "there are 8 blocks"),
    ],
    ids=str,
)
def test_what_is_refused(tiny, method, options, said) -> None:
    with pytest.raises(v.VisadaptError, match=said):
        v.inject(tiny, method, **options)
    assert not v.tasks(tiny)


def test_norms_of_a_network_without_any() -> None:
    with pytest.raises(v.VisadaptError, match="Sequential has no norms"):
        v.inject(nn.Sequential(nn.Linear(2, 2)), v.Norms())
    for n in (0, True, 1.5):
        with pytest.raises(v.VisadaptError, match="n must be a positive integer"):
            v.TopLayers(n)


def test_a_linear_probe_freezes_the_norms_by_default(tiny) -> None:
    v.inject(tiny, v.Linear(), task="a", num_classes=3)
    assert v.tasks(tiny)["a"].norms == "frozen"
    assert len(v.parameters(tiny, "a")) == 2, "weight and bias of the head"
