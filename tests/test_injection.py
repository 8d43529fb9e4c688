"""inject, eject and remove: what they take and give back."""

import inspect
import os
import time
from functools import partial

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, answer, output, same, snapshot, stir
from visadapt import Bottleneck, VisadaptError


def tiny_of(**options):
    return ZOO["tiny/resnet"].make(**options)


def test_a_builder_is_called_with_what_inject_does_not_know() -> None:
    import torchvision

    model = visadapt.inject(torchvision.models.resnet18, m=4, weights=None, num_classes=7)
    assert type(model) is torchvision.models.ResNet
    assert model.fc.out_features == 1000
    assert visadapt.tasks(model)["default"].num_classes == 7
    assert visadapt.summary(visadapt.inject(partial(tiny_of, seed=3), m=2))["default"].sites == 8


def test_a_resnet50_is_injected_in_a_moment() -> None:
    """Within 150 ms of its build; the processor's time, which a busy machine does not stretch."""
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None)
    model.to_empty(device="cpu")
    taken = []
    for _ in range(5):
        start = time.process_time()
        visadapt.inject(model, m=32)
        taken.append(time.process_time() - start)
        adapters = visadapt.summary(model)["default"].adapters
        visadapt.eject(model)
    widths = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert adapters == sum(2 * 32 * d + d + 32 for d in widths)
    assert min(taken) < 0.15 * float(os.environ.get("VISADAPT_PATIENCE", "1"))


@pytest.mark.parametrize(
    ("request_", "m"),
    [
        ({"m": 3}, 3),
        ({"method": Bottleneck(m=3)}, 3),
        ({"method": Bottleneck(m=5, activation="relu"), "m": 3}, 3),
        ({"method": "Bottleneck", "m": 3}, 3),
        ({"method": Bottleneck, "m": 3}, 3),
        ({"m": 0.5}, 0.5),
    ],
    ids=str,
)
def test_ways_to_say_the_method(request_, m) -> None:
    model = visadapt.inject(tiny_of(), **request_)
    (placement,) = visadapt.tasks(model)["default"].placements
    assert isinstance(placement.method, Bottleneck)
    assert placement.method.m == m


def test_the_default_is_the_bottleneck_of_64() -> None:
    model = tiny_of()
    visadapt.inject(model)
    assert visadapt.tasks(model)["default"].placements[0].method == Bottleneck(m=64)


def test_a_model_inside_a_wrapper_of_one_child_is_still_the_users(image) -> None:
    """A home-made model may well call its only child ``module``; it is no DataParallel for that."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_of()

        def forward(self, x):
            return 2 * self.module(x)

    model = Wrapped().eval()
    expected = model(image)
    assert visadapt.inject(model, m=2) is model
    assert torch.equal(model(image), expected)
    assert "_visadapt" in vars(model)
    assert visadapt.eject(model) is model


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapper_of_torch_is_seen_through_and_given_back(wrap) -> None:
    model = tiny_of()
    wrapped = wrap(model)
    assert visadapt.inject(wrapped, m=2, task="a") is wrapped
    assert visadapt.active(model) == visadapt.active(wrapped) == "a"
    assert visadapt.inject(model, m=2, task="b") is model
    assert visadapt.remove(wrapped, "a") is wrapped
    assert list(visadapt.tasks(wrapped)) == ["b"]
    assert visadapt.eject(wrapped) is wrapped
    assert visadapt.tasks(model) == {}


def test_shared_modules_are_adapted_wherever_they_are_used() -> None:
    """One block used twice is one place with one adapter, as it has one weight."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.again = self.body

        def forward(self, x):
            return self.again(self.body(x))

    model = Twice()
    x = torch.randn(3, 4)
    visadapt.inject(model, Bottleneck(m=1, init_std=0.5), where="body", example=x)
    once = model.body(x)
    assert torch.equal(model(x), model.body(once))
    assert len(visadapt.parameters(model)) == 4
    visadapt.eject(model)
    assert type(model.again) is nn.Linear


def test_a_part_of_an_injected_model_cannot_be_injected_again() -> None:
    inner = tiny_of()
    outer = nn.Sequential(inner)
    visadapt.inject(inner, m=2)
    before = anatomy(outer)
    with pytest.raises(VisadaptError, match=r"0\.conv1|0\.bn1.* is already part of another injected model"):
        visadapt.inject(outer, m=2)
    assert anatomy(outer) == before
    visadapt.eject(inner)
    visadapt.inject(outer, m=2, where="0.layer1*")


def test_hooks_see_what_the_adapter_gives(tiny, image) -> None:
    """A feature extractor that hooks a block sees the features of the task in use."""
    seen = []
    tiny.layer1[0].bn2.register_forward_hook(lambda module, args, out: seen.append(out))
    visadapt.inject(tiny, m=2)
    stir(tiny, "default")
    answer(tiny, {"x": image}, None)
    answer(tiny, {"x": image}, "default")
    assert not torch.equal(*seen)
    visadapt.eject(tiny)
    answer(tiny, {"x": image})
    assert torch.equal(seen[0], seen[2])


def replaced_head(model):
    model.fc = nn.Linear(32, 4)
    return "fc"


def synchronised(model):
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return "bn1"


@pytest.mark.parametrize("replace", [replaced_head, synchronised])
def test_a_host_that_was_replaced_since_is_noticed(tiny, tmp_path, replace) -> None:
    """Its adapters would no longer act, and nobody would know."""
    visadapt.inject(tiny, m=2, num_classes=3)
    path = replace(tiny)
    with pytest.raises(VisadaptError, match=rf"^{path} was replaced after the inject.*'default'"):
        visadapt.parameters(tiny)
    with pytest.raises(VisadaptError, match=rf"^{path} was replaced after the inject.*'default'"):
        visadapt.save(tiny, "default", tmp_path / "task.visadapt")
    assert not list(tmp_path.iterdir())
    visadapt.eject(tiny)
    visadapt.inject(tiny, m=2, num_classes=3)
    assert visadapt.parameters(tiny)


def test_a_host_inside_a_wrapper_is_where_it_was(tiny, image) -> None:
    class Twice(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    visadapt.inject(tiny, m=2)
    before = len(visadapt.parameters(tiny))
    tiny.layer1 = Twice(tiny.layer1)
    assert len(visadapt.parameters(tiny)) == before
    stir(tiny, "default")
    assert not torch.equal(answer(tiny, {"x": image}, "default"), answer(tiny, {"x": image}, None))


def test_modes_of_the_parts_follow_the_model(tiny) -> None:
    tiny.train()
    visadapt.inject(tiny, m=2, norms="full", num_classes=3)
    own = [module for name, module in tiny.named_modules() if "visadapt" in name.split(".")]
    assert own
    assert all(module.training for module in own)
    tiny.eval()
    assert not any(module.training for module in own)
    visadapt.inject(tiny, m=2, task="b", norms="full")
    assert not any(module.training for name, module in tiny.named_modules() if ".visadapt.b" in name)


def test_an_injected_model_prints_and_says_what_it_holds(tiny) -> None:
    visadapt.inject(tiny, m=2, task="flowers")
    text = repr(tiny)
    assert "BottleneckAdapter" in text
    assert "flowers" in text


@pytest.mark.parametrize("function", [visadapt.inject, visadapt.sites, visadapt.save, visadapt.load, visadapt.using])
def test_the_public_functions_are_documented(function) -> None:
    doc = inspect.getdoc(function)
    assert "Args:" in doc
    assert "Raises:" in doc
    missing = [name for name in inspect.signature(function).parameters if f"{name}:" not in doc]
    assert not missing


def test_nothing_is_left_behind_when_a_builder_of_parts_fails(tiny, monkeypatch) -> None:
    """A method that fails at its last site has put nothing at its first."""
    state, before = snapshot(tiny), anatomy(tiny)
    build, built = Bottleneck.build, []

    def fail_late(self, site, host):
        built.append(site)
        if len(built) == 5:
            raise MemoryError("no room")
        return build(self, site, host)

    monkeypatch.setattr(Bottleneck, "build", fail_late)
    with pytest.raises(MemoryError, match="no room"):
        visadapt.inject(tiny, m=2, num_classes=3)
    assert anatomy(tiny) == before
    assert same(tiny.state_dict(), state)
    assert visadapt.tasks(tiny) == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_adapters(seed, image) -> None:
    def make():
        torch.manual_seed(seed)
        return visadapt.inject(tiny_of(), Bottleneck(m=4, init_std=0.1), num_classes=3)

    assert same(snapshot(make()), snapshot(make()))
    assert torch.equal(output(make(), {"x": image}), output(make(), {"x": image}))
