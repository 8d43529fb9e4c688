"""Promises 1 and 2: the model stays the user's, starts as it was, and learns from the first step."""

import inspect
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, answer, bare_part, output, same, snapshot, step, stir

POLICIES = ("frozen", "affine", "full")


def test_inject_leaves_the_model_what_it_is(model, member, inputs, lent) -> None:
    before = answer(model, inputs)
    plain = type(model)
    signature = inspect.signature(model.forward)
    injected = visadapt.inject(model, m=4, norms="affine")
    assert injected is model
    # transformers' own loss reads model.config: a subclass of the same name lets it read the task's
    assert type(model) is plain or (member.text and type(model).__mro__[1] is plain)
    assert inspect.signature(model.forward) == signature
    for name, cls in lent["anatomy"]["classes"].items():
        module = model.get_submodule(name)
        assert isinstance(module, cls)
        assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)
    assert same(bare_part(model.state_dict()), lent["state"])
    for name, identity in lent["anatomy"]["identities"].items():
        assert id(model.get_parameter(name)) == identity
    assert torch.equal(answer(model, inputs, "default"), before)
    assert torch.equal(answer(model, inputs, None), before)
    stir(model, "default")
    assert not torch.equal(answer(model, inputs, "default"), before)
    assert torch.equal(answer(model, inputs, None), before)


@pytest.mark.parametrize("norms", POLICIES)
def test_starts_as_it_was_under_every_norm_policy(model, inputs, norms) -> None:
    before = answer(model, inputs)
    visadapt.inject(model, m=0.1, norms=norms)
    assert torch.equal(answer(model, inputs, "default"), before)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "plain-dict"])
def test_vanilla_checkpoint_loads_strictly(model, inputs, lent, metadata) -> None:
    before = answer(model, inputs)
    visadapt.inject(model, m=4, norms="full")
    stir(model, "default")
    adapted = answer(model, inputs, "default")
    state = OrderedDict(lent["state"])
    if metadata:
        state._metadata = {name: {"version": module._version} for name, module in model.named_modules()}
    keys = list(state)
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == keys
    assert torch.equal(answer(model, inputs, "default"), adapted)
    assert torch.equal(answer(model, inputs, None), before)


def test_state_dict_survives_a_safe_pickle(model, inputs) -> None:
    visadapt.inject(model, m=4, norms="full")
    stir(model, "default")
    adapted = answer(model, inputs, "default")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert same(state, model.state_dict())
    stir(model, "default", seed=2)
    model.load_state_dict(state)
    assert torch.equal(answer(model, inputs, "default"), adapted)


def test_eject_gives_the_original_back(model, inputs, lent) -> None:
    before = answer(model, inputs)
    calls = []
    first = next(name for name, _ in model.named_modules() if name)
    host = visadapt.sites(model)[-1].host
    handles = [
        model.get_submodule(first).register_forward_hook(lambda *_: calls.append("first")),
        model.get_submodule(host).register_forward_hook(lambda *_: calls.append("host")),
        model.get_submodule(host).register_forward_pre_hook(lambda *_: calls.append("pre")),
    ]
    # a model half frozen and half in train mode by its owner
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    model.train()
    model.get_submodule(first).eval()
    owners = anatomy(model)
    visadapt.inject(model, m=4, norms="full", num_classes=5)
    visadapt.inject(model, m=2, norms="affine", task="other")
    assert visadapt.eject(model) is model
    assert anatomy(model) == owners
    assert same(model.state_dict(), lent["state"])
    calls.clear()
    assert torch.equal(answer(model, inputs), before)
    assert {"first", "host", "pre"} <= set(calls)
    for handle in handles:
        handle.remove()
    model.requires_grad_(True)


def test_modes_set_while_injected_hold_after_eject(model) -> None:
    visadapt.inject(model, m=2)
    model.train()
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "visadapt" not in name]
    assert not any(norm.training for norm in norms)
    visadapt.eject(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("norms", POLICIES)
def test_both_projections_learn(model, member, norms) -> None:
    # two samples of one pixel are ±1 after batch statistics, whatever came before, and a loss that a long step has
    # saturated has no gradient: four samples and short steps, so that a zero is the adapter's own
    inputs = member.inputs(n=4)
    visadapt.inject(model, m=4, norms=norms, num_classes=3)
    optimiser = torch.optim.SGD(visadapt.parameters(model), lr=0.01)
    model.train()
    named = dict(visadapt.named_parameters(model, "default"))
    step(model, inputs)
    for name, p in named.items():
        if ".up." in name or name.startswith("head"):
            assert p.grad is not None, name
            assert p.grad.any(), name
    assert all(p.grad is None for name, p in model.named_parameters() if "visadapt" not in name.split("."))
    before = {name: p.detach().clone() for name, p in named.items()}
    optimiser.step()
    assert all(not torch.equal(p, before[name]) for name, p in named.items() if ".up.weight" in name)
    optimiser.zero_grad()
    step(model, inputs)
    for name, p in named.items():
        if ".up.weight" in name or ".down.weight" in name:
            assert p.grad is not None, name
            assert p.grad.any(), name


def test_the_near_identity_of_the_paper(model, inputs) -> None:
    before = answer(model, inputs)
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=1e-3))
    after = answer(model, inputs, "default")
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
    step(model, inputs)
    for name, p in visadapt.named_parameters(model, "default"):
        if ".up.weight" in name or ".down.weight" in name:
            assert p.grad is not None, name
            assert p.grad.any(), name


def test_tasks_of_a_checkpoint_are_checked_strictly(tiny) -> None:
    visadapt.inject(tiny, m=2, task="flowers")
    state = snapshot(tiny)
    lost = next(key for key in state if "flowers" in key)
    partial = {key: value for key, value in state.items() if key != lost}
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        tiny.load_state_dict(partial)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*flowers"):
        ZOO["tiny/resnet"].make().load_state_dict(state)
    misnamed = {key.replace("visadapt.flowers", "visadapt.birds"): value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*birds"):
        tiny.load_state_dict(misnamed)


@pytest.mark.parametrize("assign", [False, True])
def test_a_vanilla_checkpoint_leaves_the_optimisers_parameters_in_place(tiny, image, assign) -> None:
    vanilla = ZOO["tiny/resnet"].make(seed=5)
    visadapt.inject(tiny, m=2)
    held = [id(p) for p in visadapt.parameters(tiny)]
    tiny.load_state_dict(snapshot(vanilla), assign=assign)
    assert [id(p) for p in visadapt.parameters(tiny)] == held
    with torch.no_grad(), visadapt.using(tiny, None):
        assert torch.equal(tiny(image), vanilla(image))


def test_a_norm_copy_reads_the_statistics_of_a_newly_loaded_backbone(tiny, image) -> None:
    """With the affine policy the statistics are the backbone's, also when these come from a later checkpoint."""
    other = ZOO["tiny/resnet"].make(seed=5)
    visadapt.inject(tiny, m=2, norms="affine")
    tiny.load_state_dict(snapshot(other), assign=True)
    reference = visadapt.inject(ZOO["tiny/resnet"].make(seed=5), m=2, norms="affine")
    reference.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        assert torch.equal(tiny(image), reference(image))


def test_output_of_a_model_in_train_mode(model, inputs) -> None:
    """Dropout draws what it drew before: injecting changes nothing for the backbone's own random numbers."""
    visadapt.inject(model, m=4)
    model.train()
    with torch.no_grad():
        torch.manual_seed(3)
        adapted = output(model, inputs)
        torch.manual_seed(3)
        with visadapt.using(model, None):
            assert torch.equal(output(model, inputs), adapted)
