"""A task without some of its parts, and a task that starts from another's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.experiments.conftest import small, stirred, who
from tests.models import ZOO, answer, same, snapshot
from visadapt import VisadaptError
from visadapt.experiments.transplant import body, depths, layers, start_from, without
from visadapt.methods import AdaptFormer, Bottleneck, Full, Linear
from visadapt.runtime.registry import named_tensors, registry_of

BACKBONES = ["tiny/resnet", "tiny/vgg_bn", "transformers/bert"]


def injected(name: str, where: object = None, norms: str = "affine") -> nn.Module:
    model = ZOO[name].make()
    visadapt.inject(model, m=4, task="t", num_classes=5, norms=norms, where=where)
    return model


def copied(model: nn.Module, source: dict[str, Tensor]) -> None:
    """All values of a task that the other has too, the head's among them."""
    with torch.no_grad():
        for key, tensor in named_tensors(registry_of(model), "t").items():
            tensor.copy_(source[key])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norms", [False, True])
def test_a_task_without_parts_is_one_that_never_had_them(name: str, norms: bool) -> None:
    inputs = ZOO[name].inputs()
    model = stirred(injected(name), "t")
    whole, state, values = answer(model, inputs, "t"), snapshot(model), dict(named_tensors(registry_of(model), "t"))
    every = sorted(set(depths(model, "t").values()))
    gone = every[-1:] if len(every) < 4 else every[1:4]
    kept = injected(name, where=[d for d in every if d not in gone])
    copied(kept, values)
    if norms:
        at = {path for path, depth in depths(model, "t").items() if depth in gone}
        for path, parts in registry_of(kept).parts("t").items():
            if path in at and "norm" in parts:
                plain = dict(kept.get_submodule(path).named_parameters(recurse=False))
                with torch.no_grad():
                    for key, value in parts["norm"].named_parameters():
                        value.copy_(plain[key])
    with without(model, "t", gone, norms=norms):
        found = answer(model, inputs, "t")
    assert torch.equal(found, answer(kept, inputs, "t"))
    assert not torch.equal(found, whole)
    assert torch.equal(answer(model, inputs, "t"), whole)
    assert same(snapshot(model), state), "the parts are back, in order"


def test_without_everything_but_head_and_outer_norms_it_is_the_backbone(tiny: nn.Module, image: Tensor) -> None:
    features = []
    visadapt.inject(tiny, m=4, task="t", num_classes=5, norms="frozen")
    tiny.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    bare = answer(tiny, {"x": image}) is not None
    stirred(tiny, "t")
    with without(tiny, "t", range(8), norms=True):
        answer(tiny, {"x": image}, "t")
    assert bare
    assert torch.equal(features[0], features[1])


def test_parts_come_back_after_an_error(tiny: nn.Module) -> None:
    visadapt.inject(tiny, m=4, task="t", num_classes=5)
    state = snapshot(tiny)

    def fail() -> None:
        with without(tiny, "t", range(8), norms=True):
            assert len(snapshot(tiny)) < len(state)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert same(snapshot(tiny), state)


@pytest.mark.parametrize("name", BACKBONES)
def test_depths_cover_all_adapters_and_no_head(name: str) -> None:
    model = injected(name)
    found = depths(model, "t")
    parts = registry_of(model).parts("t")
    assert {path for path, owned in parts.items() if "bottleneck" in owned} <= set(found)
    assert not any("head" in parts[path] for path in found)


def test_layers_are_counted_by_the_sites_of_a_method() -> None:
    assert layers(small(), who(Bottleneck(4))) == 8
    # one trains all, one a head, and one stands beside MLPs, which a ResNet has not
    for method in (Full(), Linear(), AdaptFormer()):
        with pytest.raises(VisadaptError, match="'this one' puts no adapters into layers of timm/resnet18"):
            layers(small(), who(method, "this one"))


def test_a_start_is_the_others_but_for_the_head(tiny: nn.Module) -> None:
    visadapt.inject(tiny, m=4, task="a", num_classes=5)
    visadapt.inject(tiny, m=4, task="b", num_classes=7)
    stirred(tiny, "a")
    heads = {key: t.clone() for key, t in named_tensors(registry_of(tiny), "b").items() if ".head." in f".{key}"}
    start_from(tiny, "b", body(tiny, "a"))
    own, source = body(tiny, "b"), body(tiny, "a")
    assert list(own) == list(source)
    assert all(torch.equal(own[key], source[key]) for key in own)
    assert heads
    after = named_tensors(registry_of(tiny), "b")
    assert all(torch.equal(after[key], value) for key, value in heads.items())
    visadapt.inject(tiny, m=3, task="c", num_classes=5)
    before = snapshot(tiny)
    with pytest.raises(VisadaptError, match="task 'c' cannot start from the other"):
        start_from(tiny, "c", body(tiny, "a"))
    assert same(snapshot(tiny), before)
