"""A task without some of its parts, and a task that starts from another one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.experiments.conftest import make_contender, perturbed, small
from tests.models import ZOO, answer, same, snapshot
from visadapt import VisadaptError
from visadapt.experiments.transplant import body_tensors, count_layers, host_depths, start_from, without_layers
from visadapt.methods import AdaptFormer, Bottleneck, Full, Linear
from visadapt.runtime.registry import named_tensors, registry_of

BACKBONES = ["tiny/resnet", "tiny/vgg_bn", "transformers/bert"]


def injected(name: str, where: object = None, norms: str = "affine") -> nn.Module:
    model = ZOO[name].make()
    visadapt.inject(model, m=4, task="t", num_classes=5, norms=norms, where=where)
    return model


def copy_values(model: nn.Module, source: dict[str, Tensor]) -> None:
    """Copy all values of task ``t`` from ``source``, including the head's."""
    with torch.no_grad():
        for key, tensor in named_tensors(registry_of(model), "t").items():
            tensor.copy_(source[key])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norms", [False, True])
def test_a_task_without_parts_equals_one_that_never_had_them(name: str, norms: bool) -> None:
    inputs = ZOO[name].inputs()
    model = perturbed(injected(name), "t")
    whole, state, values = answer(model, inputs, "t"), snapshot(model), dict(named_tensors(registry_of(model), "t"))
    depths = sorted(set(host_depths(model, "t").values()))
    removed = depths[-1:] if len(depths) < 4 else depths[1:4]
    kept = injected(name, where=[d for d in depths if d not in removed])
    copy_values(kept, values)
    if norms:
        hosts = {path for path, depth in host_depths(model, "t").items() if depth in removed}
        for path, parts in registry_of(kept).parts("t").items():
            if path in hosts and "norm" in parts:
                plain = dict(kept.get_submodule(path).named_parameters(recurse=False))
                with torch.no_grad():
                    for key, value in parts["norm"].named_parameters():
                        value.copy_(plain[key])
    with without_layers(model, "t", removed, norms=norms):
        outputs = answer(model, inputs, "t")
    assert torch.equal(outputs, answer(kept, inputs, "t"))
    assert not torch.equal(outputs, whole)
    assert torch.equal(answer(model, inputs, "t"), whole)
    assert same(snapshot(model), state), "the parts are back, in the same order"


def test_without_everything_but_head_and_outer_norms_it_is_the_backbone(tiny: nn.Module, image: Tensor) -> None:
    features = []
    visadapt.inject(tiny, m=4, task="t", num_classes=5, norms="frozen")
    tiny.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    bare = answer(tiny, {"x": image}) is not None
    perturbed(tiny, "t")
    with without_layers(tiny, "t", range(8), norms=True):
        answer(tiny, {"x": image}, "t")
    assert bare
    assert torch.equal(features[0], features[1])


def test_parts_come_back_after_an_error(tiny: nn.Module) -> None:
    visadapt.inject(tiny, m=4, task="t", num_classes=5)
    state = snapshot(tiny)

    def fail() -> None:
        with without_layers(tiny, "t", range(8), norms=True):
            assert len(snapshot(tiny)) < len(state)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert same(snapshot(tiny), state)


@pytest.mark.parametrize("name", BACKBONES)
def test_depths_cover_all_adapters_and_no_head(name: str) -> None:
    model = injected(name)
    depths = host_depths(model, "t")
    parts = registry_of(model).parts("t")
    assert {path for path, owned in parts.items() if "bottleneck" in owned} <= set(depths)
    assert not any("head" in parts[path] for path in depths)


def test_layers_are_counted_by_the_sites_of_a_method() -> None:
    assert count_layers(small(), make_contender(Bottleneck(4))) == 8
    # the first two have no adapters; AdaptFormer adapts MLPs, which a ResNet does not have
    for method in (Full(), Linear(), AdaptFormer()):
        with pytest.raises(VisadaptError, match=r"adapters in the layers of timm/resnet18.* got 'this one'"):
            count_layers(small(), make_contender(method, "this one"))


def test_a_start_copies_everything_but_the_head(tiny: nn.Module) -> None:
    visadapt.inject(tiny, m=4, task="a", num_classes=5)
    visadapt.inject(tiny, m=4, task="b", num_classes=7)
    perturbed(tiny, "a")
    heads = {key: t.clone() for key, t in named_tensors(registry_of(tiny), "b").items() if ".head." in f".{key}"}
    start_from(tiny, "b", body_tensors(tiny, "a"))
    target, source = body_tensors(tiny, "b"), body_tensors(tiny, "a")
    assert list(target) == list(source)
    assert all(torch.equal(target[key], source[key]) for key in target)
    assert heads
    after = named_tensors(registry_of(tiny), "b")
    assert all(torch.equal(after[key], value) for key, value in heads.items())
    visadapt.inject(tiny, m=3, task="c", num_classes=5)
    before = snapshot(tiny)
    with pytest.raises(VisadaptError, match=r"task 'c' cannot start from another task without .* of shape \(3, 8\)"):
        start_from(tiny, "c", body_tensors(tiny, "a"))
    assert same(snapshot(tiny), before)
