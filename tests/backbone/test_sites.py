"""Sites: where they are, how ``where`` chooses them, and that an adapter there stands where the papers put it."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, answer
from visadapt import Bottleneck, Site, VisadaptError

NET = ZOO["tiny/resnet"].make()
BERT = ZOO["transformers/bert"].make()
STAGES = {"layer1": range(2), "layer2": range(2, 4), "layer3": range(4, 6), "layer4": range(6, 8)}


def hosts(model, where):
    return [site.full_name for site in visadapt.sites(model, where)]


def test_the_plan_of_a_member(model, member, lent) -> None:
    plan = visadapt.sites(model)
    assert Counter(site.kind for site in plan) == member.kinds
    assert [site.depth for site in plan] == sorted(site.depth for site in plan)
    assert len({site.full_name for site in plan}) == len(plan)
    modules = dict(model.named_modules())
    assert all(site.host in modules for site in plan)
    assert all(site.layout == ("NLC" if member.text else "NCHW") for site in plan)
    assert anatomy(model) == lent["anatomy"]
    visadapt.inject(model, m=2)
    assert visadapt.sites(model) == plan


def test_channels_are_those_of_the_hosts_output(model, member, inputs) -> None:
    plan = visadapt.sites(model)
    seen = {}
    handles = [
        model.get_submodule(site.host).register_forward_hook(lambda m, a, out, site=site: seen.update({site: out}))
        for site in plan
    ]
    answer(model, inputs)
    for handle in handles:
        handle.remove()
    for site in plan:
        assert seen[site].shape[-1 if member.text else 1] == site.channels
        assert seen[site].ndim == (3 if member.text else 4)


def shift(site):
    # not the same for all channels: a LayerNorm would take that out again
    return torch.linspace(-0.3, 0.5, site.channels)


def resnet_reference(model, site):
    model.get_submodule(site.host).bias.data += shift(site)


def transformer_reference(model, site):
    host = site.host.replace("output.dropout", "output.dense")
    model.get_submodule(f"{host}.lin2" if host.endswith("ffn") else host).bias.data += shift(site)


@pytest.mark.parametrize(
    ("member", "reference"),
    [
        ("tiny/resnet", resnet_reference),
        ("torchvision/resnet50", resnet_reference),
        ("timm/resnet26t", resnet_reference),
        *((name, transformer_reference) for name, m in ZOO.items() if m.text),
    ],
    indirect=["member"],
    scope="session",
)
def test_an_adapter_acts_on_the_branch_before_the_add(model, inputs, reference) -> None:
    """An adapter that adds a constant is the same as a bias on what ends the residual branch."""
    plain = copy.deepcopy(model)
    visadapt.inject(model, m=1, norms="frozen", head="frozen")
    named = dict(visadapt.named_parameters(model, "default"))
    for site in visadapt.sites(plain):
        if site.kind in ("block", "attention", "mlp"):
            reference(plain, site)
            named[f"{site.host}.bottleneck.up.bias"].data.copy_(shift(site))
    torch.testing.assert_close(answer(model, inputs, "default"), answer(plain, inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(model, inputs, "default"), answer(model, inputs, None), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("member", ["timm/seresnet50"], indirect=True, scope="session")
def test_after_squeeze_and_excitation(model) -> None:
    assert {site.host.rpartition(".")[2] for site in visadapt.sites(model, "block")} == {"se"}


@pytest.mark.parametrize(
    ("where", "depths", "kinds"),
    [
        (None, range(8), {"block", "conv3x3"}),
        ("block", range(8), {"block"}),
        ("conv3x3", range(8), {"conv3x3"}),
        *((stage, depths, {"block", "conv3x3"}) for stage, depths in STAGES.items()),
        (3, [3], {"block", "conv3x3"}),
        (-1, [7], {"block", "conv3x3"}),
        (-8, [0], {"block", "conv3x3"}),
        (range(2), [0, 1], {"block", "conv3x3"}),
        (range(1, 8, 3), [1, 4, 7], {"block", "conv3x3"}),
        (range(6, 100), [6, 7], {"block", "conv3x3"}),
        (slice(-2, None), [6, 7], {"block", "conv3x3"}),
        (slice(None, None, 4), [0, 4], {"block", "conv3x3"}),
        ("layer3.*", [4, 5], {"block", "conv3x3"}),
        ("layer?.0*", [0, 2, 4, 6], {"block", "conv3x3"}),
        ("conv3x3:layer3.*", [4, 5], {"conv3x3"}),
        ("block:*", range(8), {"block"}),
        ("layer4.1.bn2", [7], {"block"}),
        ("*.conv1", range(8), {"conv3x3"}),
        (["layer1", 7], [0, 1, 7], {"block", "conv3x3"}),
        (("block:layer1.*", "conv3x3:layer4.*"), [0, 1, 6, 7], {"block", "conv3x3"}),
        ({"block"}, range(8), {"block"}),
        (lambda site: site.channels == 24, [4, 5], {"block", "conv3x3"}),
        ([lambda site: site.depth == 0, range(3, 4)], [0, 3], {"block", "conv3x3"}),
        (visadapt.sites(NET)[0], [0], {"conv3x3"}),
        (visadapt.sites(NET, "layer2"), [2, 3], {"block", "conv3x3"}),
    ],
)
def test_every_form_of_where(where, depths, kinds) -> None:
    found = visadapt.sites(NET, where)
    assert sorted({site.depth for site in found}) == list(depths)
    assert set(found.kinds()) == kinds


@pytest.mark.parametrize(
    ("where", "kinds"),
    [(None, {"block"}), ("layer2", {"block"}), (0, {"block"}), ("layer*", {"block"}), ("*.conv2", {"conv3x3"})],
)
def test_inject_takes_the_methods_own_kinds_where_there_are_any(where, kinds) -> None:
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, where=where)
    (placement,) = visadapt.tasks(model)["default"].placements
    assert {name.partition(":")[0] for name in placement.sites} == kinds


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("attention", ["attention:bert.encoder.layer.0.attention.output.dropout"] * 1),
        ("bert.encoder.layer.1", []),
        ("*.1.*", []),
        (1, []),
        (slice(1, None), []),
    ],
)
def test_where_in_a_transformer(where, expected) -> None:
    found = hosts(BERT, where)
    if where == "attention":
        assert len(found) == 2
        assert found[0] == expected[0]
    else:
        assert [name.rpartition("layer.")[2][0] for name in found] == ["1"] * 4
        assert {name.partition(":")[0] for name in found} == {"attention", "mlp", "query", "value"}


@given(st.data())
def test_depths_are_pythons_own(data) -> None:
    """Slices, ranges and ints choose blocks as they would choose from a list of them."""
    blocks = list(range(8))
    term = data.draw(st.slices(8) | st.integers(-8, 7) | st.builds(range, st.integers(0, 8), st.integers(0, 12)))
    expected = [blocks[term]] if isinstance(term, int) else blocks[term] if isinstance(term, slice) else list(term)
    expected = sorted(set(expected) & set(blocks))
    if expected:
        assert sorted({site.depth for site in visadapt.sites(NET, term)}) == expected
    else:
        with pytest.raises(VisadaptError, match="matches no site"):
            visadapt.sites(NET, term)


@given(st.lists(st.sampled_from(["layer1", 3, -1, slice(2, 4), "conv3x3", "block:layer2.*"]), min_size=1, max_size=4))
def test_a_list_is_the_union_in_order_of_depth(terms) -> None:
    union = {site.full_name for term in terms for site in visadapt.sites(NET, term)}
    assert hosts(NET, terms) == [site.full_name for site in visadapt.sites(NET) if site.full_name in union]


def test_a_module_that_no_family_knows_is_traced() -> None:
    model = ZOO["tiny/resnet"].make()
    (site,) = visadapt.sites(model, "maxpool")
    assert (site.host, site.kind, site.channels, site.layout) == ("maxpool", "module", 64, "NCHW")
    visadapt.inject(model, m=2, where=["maxpool", "layer4"])
    assert visadapt.tasks(model)["default"].placements[0].sites == (
        "block:layer4.0.bn2",
        "block:layer4.1.bn2",
        "module:maxpool",
    )


class Odd(nn.Module):
    """A home-made model with an input that nobody can guess, tokens and maps in it, and a part it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(5, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.tokens = nn.Linear(6, 12)
        self.head = nn.Linear(12, 3)
        self.idle = nn.Linear(2, 2)
        self.pair = Pair()

    def forward(self, x, *, scale):
        last = self.norm(self.mix(x * scale).permute(0, 2, 3, 1))
        return self.head(self.pair(self.tokens(last.flatten(1, 2)))[0].mean(1))


class Pair(nn.Module):
    def forward(self, x):
        return x, None


EXAMPLE = {"x": torch.randn(2, 5, 4, 3), "scale": torch.tensor(2.0)}


@pytest.mark.parametrize(
    ("name", "channels", "layout"),
    [("mix", 6, "NCHW"), ("norm", 6, "NHWC"), ("tokens", 12, "NLC"), ("head", 3, "NLC"), ("pair", 12, "NLC")],
)
@pytest.mark.filterwarnings("ignore:the bottleneck at module")
def test_layouts_are_read_off_the_tensors(name, channels, layout) -> None:
    model = Odd().eval()
    expected = model(**EXAMPLE)
    (site,) = visadapt.sites(model, name, example=EXAMPLE)
    assert (site.channels, site.layout) == (channels, layout)
    visadapt.inject(model, Bottleneck(m=2), where=name, example=EXAMPLE, norms="frozen")
    assert torch.equal(model(**EXAMPLE), expected)
    model(**EXAMPLE).sum().backward()
    assert dict(visadapt.named_parameters(model, "default"))[f"{name}.bottleneck.up.weight"].grad.any()


@pytest.mark.parametrize(
    ("where", "example", "message"),
    [
        ("idle", EXAMPLE, "idle is never called as a module"),
        ("mix", None, r"Odd does not run on a guessed input \(.*scale.*\); pass example="),
        ("mix", torch.zeros(2, 7, 3, 3), r"Odd does not run on the given example"),
    ],
)
def test_what_cannot_be_traced_is_said(where, example, message) -> None:
    model = Odd()
    before = anatomy(model)
    with pytest.raises(VisadaptError, match=message):
        visadapt.inject(model, m=2, where=where, example=example)
    assert anatomy(model) == before


def test_layers_outside_the_head_are_known_by_the_example() -> None:
    """No guess runs; a head looked for with another input than the sites' is not found."""

    class Sevens(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(-1, 5, 7))

    model = Sevens(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3))
    sites = visadapt.sites(model, "linear", example=torch.zeros(2, 5, 7))
    assert [site.host for site in sites] == ["0", "2"]


def test_tracing_computes_nothing_and_keeps_the_modes() -> None:
    model = ZOO["tiny/resnet"].make()
    model.train()
    model.layer1.eval()
    before, statistics = anatomy(model), model.bn1.running_mean.clone()
    visadapt.sites(model, "maxpool")
    assert anatomy(model) == before
    assert torch.equal(model.bn1.running_mean, statistics)


def test_a_site_of_another_model_is_refused() -> None:
    (site, *_) = visadapt.sites(BERT)
    model = ZOO["tiny/resnet"].make()
    with pytest.raises(VisadaptError, match=r"this ResNet has no such site: Site\(host='bert\.encoder"):
        visadapt.inject(model, m=2, where=site)
    imagined = Site("layer1.0.bn2", "block", 4096, "NCHW", 0)
    with pytest.raises(VisadaptError, match=r"no such site: Site\(host='layer1\.0\.bn2'.*channels=4096"):
        visadapt.inject(model, m=2, where=[imagined])


def test_sites_print_as_a_table() -> None:
    text = str(visadapt.sites(NET, "layer4"))
    head, rule, *rows = text.splitlines()
    assert head.split() == ["depth", "stage", "kind", "host", "channels", "layout", "adapts"]
    assert set(rule) <= {"─", " "}
    assert rows[0].split() == ["6", "layer4", "conv3x3", "layer4.0.conv1", "32", "NCHW", "6,912"]
    assert len(rows) == 6
