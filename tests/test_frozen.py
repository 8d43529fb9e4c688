"""Promise 3: training a task moves that task and nothing else."""

import copy

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, anatomy, answer, bare_part, same, snapshot, train
from visadapt import VisadaptError


def owned_by(model, task):
    return {key: value for key, value in snapshot(model).items() if f".visadapt.{task}." in key}


@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_the_backbone_stands_still(model, inputs, lent, member, norms) -> None:
    visadapt.inject(model, m=4, norms=norms, num_classes=4)
    before = owned_by(model, "default")
    train(model, "default", inputs)
    assert same(bare_part(model.state_dict()), lent["state"])
    after = owned_by(model, "default")
    assert list(after) == list(before)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    # Adam moves whatever has a gradient; a relu may be dead for a few channels, never for a whole tensor
    assert not {key for key in after if "running" not in key and "num_batches" not in key} - moved
    statistics = {key for key in after if "running_" in key}
    has_batch_norms = any("running_mean" in key for key in lent["state"])
    assert bool(statistics) == (has_batch_norms and norms == "full")
    assert statistics <= moved


def test_two_tasks_trained_in_turn(model, inputs, member) -> None:
    """The first task and the bare backbone answer bit for bit as before, whatever the second one does."""
    bare = answer(model, inputs)
    visadapt.inject(model, m=4, task="first", norms="full", num_classes=3)
    train(model, "first", inputs)
    first = answer(model, inputs, "first")
    state = owned_by(model, "first")
    visadapt.inject(model, m=8, task="second", norms="full", num_classes=6)
    train(model, "second", member.inputs(seed=7))
    assert not torch.equal(answer(model, inputs, "second")[:, :3], first)
    assert torch.equal(answer(model, inputs, "first"), first)
    assert torch.equal(answer(model, inputs, None), bare)
    assert same(owned_by(model, "first"), state)
    second = answer(model, inputs, "second")
    train(model, "first", inputs, steps=1)
    assert torch.equal(answer(model, inputs, "second"), second)
    assert torch.equal(answer(model, inputs, None), bare)


@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_a_bare_forward_in_train_mode_moves_no_statistics(tiny, image, norms) -> None:
    visadapt.inject(tiny, m=2, norms=norms)
    before = snapshot(tiny)
    tiny.train()
    with visadapt.using(tiny, None):
        tiny(image)
    assert same(snapshot(tiny), before)


def test_only_full_has_statistics_of_its_own(tiny, image) -> None:
    for policy in ("affine", "full"):
        visadapt.inject(tiny, m=2, task=policy, norms=policy)
    before = snapshot(tiny)
    tiny.train()
    for policy in ("affine", "full"):
        with visadapt.using(tiny, policy), torch.no_grad():
            tiny(image)
    changed = {key for key, value in snapshot(tiny).items() if not torch.equal(value, before[key])}
    assert changed
    assert all(".visadapt.full.norm." in key for key in changed)
    assert not any("running_" in key and ".visadapt.affine." in key for key in before)


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_power_iteration_stands_still(tiny, image, normed) -> None:
    """Spectral norm, old and new, moves its vectors in every forward in train mode."""
    normed(tiny.layer1[0].conv1)
    bare, before, classes = answer(tiny, {"x": image}), snapshot(tiny), anatomy(tiny)
    visadapt.inject(tiny, m=2, norms="full")
    train(tiny, "default", {"x": image})
    assert same(bare_part(snapshot(tiny)), before)
    assert torch.equal(answer(tiny, {"x": image}, None), bare)
    visadapt.eject(tiny)
    assert anatomy(tiny) == classes


def test_no_optimiser_over_the_whole_model_can_move_the_backbone(tiny, image) -> None:
    """Weight decay reaches what has no gradient only if an optimiser thinks it has one."""
    frozen = bare_part(snapshot(tiny))
    visadapt.inject(tiny, m=2, task="a")
    optimiser = torch.optim.AdamW(tiny.parameters(), lr=0.1, weight_decay=0.5)
    tiny.train()
    for _ in range(2):
        optimiser.zero_grad()
        tiny(image).sum().backward()
        optimiser.step()
    assert same(bare_part(tiny.state_dict()), frozen)


def test_gradients_from_before_move_nothing(tiny, image) -> None:
    tiny(image).sum().backward()
    frozen = snapshot(tiny)
    visadapt.inject(tiny, m=2)
    torch.optim.SGD(tiny.parameters(), lr=0.1).step()
    assert same(bare_part(tiny.state_dict()), frozen)


def test_trainable_lets_gradients_flow_to_the_named_tasks_only(tiny, image) -> None:
    for task in ("a", "b", "c"):
        visadapt.inject(tiny, m=2, task=task, num_classes=2)
    assert visadapt.trainable(tiny, ["a", "c"]) is tiny
    for task, flows in (("a", True), ("b", False), ("c", True)):
        assert {p.requires_grad for p in visadapt.parameters(tiny, task)} == {flows}
    visadapt.trainable(tiny, "b")
    assert {p.requires_grad for p in visadapt.parameters(tiny, "a")} == {False}
    visadapt.activate(tiny, "b")
    tiny(image).sum().backward()
    assert all(p.grad is None for p in visadapt.parameters(tiny, "a"))
    assert any(p.grad is not None for p in visadapt.parameters(tiny, "b"))
    assert not any(p.requires_grad for name, p in tiny.named_parameters() if "visadapt" not in name)


def test_parameters_are_the_tasks_own_and_no_others(model) -> None:
    backbone = {id(p) for p in model.parameters()}
    visadapt.inject(model, m=2, task="a", norms="full", num_classes=2)
    visadapt.inject(model, m=2, task="b", norms="affine", num_classes=2)
    a, b = ({id(p) for p in visadapt.parameters(model, task)} for task in "ab")
    everything = {id(p) for p in model.parameters()}
    assert a
    assert not a & b
    assert not (a | b) & backbone
    assert a | b | backbone == everything
    names = [name for name, _ in visadapt.named_parameters(model, "a")]
    assert len(set(names)) == len(names) == len(a)


def test_dropout_of_an_adapter_acts_in_train_mode_only(image) -> None:
    tiny = ZOO["tiny/resnet"].make()
    visadapt.inject(tiny, visadapt.Bottleneck(m=4, init_std=0.1, dropout=0.5), norms="frozen")
    with torch.no_grad():
        assert torch.equal(tiny(image), tiny(image))
        tiny.train()
        assert not torch.equal(tiny(image), tiny(image))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_scales_its_weight_is_refused(kind) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (4, 5))
    layers = [nn.Flatten(), nn.Linear(40, 8)] if kind is nn.Embedding else [nn.Linear(8, 8)]
    model = nn.Sequential(kind(20, 8, max_norm=1.0), *layers, nn.ReLU(), nn.Linear(8, 3))
    weight = model[0].weight.detach().clone()
    put = {"where": str(len(layers)), "example": ids, "head": "frozen"}
    with pytest.raises(VisadaptError, match=r"the forward of 0 changes its weight \(max_norm=1\)"):
        visadapt.inject(model, m=1, **put)
    assert torch.equal(model[0].weight, weight)
    # a task with a weight of its own has the plain model's
    plain = copy.deepcopy(model)
    visadapt.inject(model, visadapt.Full(), task="own", norms="frozen", head="frozen")
    assert torch.equal(model(ids), plain(ids))
    visadapt.eject(model)
    assert torch.equal(model[0].weight, weight)
    # what the message says
    model[0].weight.data = torch.renorm(model[0].weight.data, 2, 0, 1)
    model[0].max_norm = None
    visadapt.inject(model, m=1, **put)
    torch.testing.assert_close(model(ids), plain(ids))
