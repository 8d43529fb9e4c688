"""Other libraries swap classes too: theirs, below or on top of ours, outlive whatever we put in and take out."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize

import visadapt
from tests.models import ZOO, anatomy, answer, bare_part, same, snapshot, step, stir
from visadapt import DAN, Bottleneck, LoRA, Parallel, VisadaptError


class Half(nn.Module):
    """A parametrization: half of each value."""

    def forward(self, x):
        return x / 2


def backbone_modules(model):
    return [m for name, m in model.named_modules() if "visadapt" not in name.split(".")]


def parametrized(model):
    for module in backbone_modules(model):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrizations.weight_norm(module)


METHODS = [Bottleneck(m=2), LoRA(r=2), Parallel()]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("take", ["remove", "eject", "unlean"])
def test_a_parametrization_on_top_survives(tiny, image, method, take) -> None:
    visadapt.inject(tiny, method, task="a", norms="frozen")
    visadapt.inject(tiny, m=2, task="b", norms="frozen")
    for task in "ab":
        stir(tiny, task)
    expected = {task: answer(tiny, {"x": image}, task) for task in (None, "a", "b")}
    if take == "unlean":
        visadapt.lean(tiny)
    parametrized(tiny)
    for task in expected:
        torch.testing.assert_close(answer(tiny, {"x": image}, task), expected[task], rtol=1e-4, atol=1e-4)
    # what comes on top afterwards, and goes
    visadapt.inject(tiny, m=1, task="c", where="conv3x3", norms="frozen")
    visadapt.remove(tiny, "c")
    if take == "remove":
        visadapt.remove(tiny, "a")
        visadapt.remove(tiny, "b")
    elif take == "eject":
        visadapt.eject(tiny)
    else:
        visadapt.unlean(tiny)
    convs = [m for m in backbone_modules(tiny) if isinstance(m, nn.Conv2d)]
    assert all(parametrize.is_parametrized(m, "weight") and "weight" not in m._parameters for m in convs)
    torch.testing.assert_close(answer(tiny, {"x": image}, None), expected[None], rtol=1e-4, atol=1e-4)
    # what the user trains of it is seen
    with torch.no_grad():
        for conv in convs:
            conv.parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(answer(tiny, {"x": image}, None), expected[None])
    if take == "eject":
        for conv in convs:
            parametrize.remove_parametrizations(conv, "weight")
        assert {type(conv) for conv in convs} == {nn.Conv2d}


def test_a_parametrization_below_survives(tiny, image) -> None:
    parametrized(tiny.eval())
    tiny.eval()
    before, expected = anatomy(tiny), answer(tiny, {"x": image})
    visadapt.inject(tiny, LoRA(r=2), task="a", norms="full")
    assert torch.equal(answer(tiny, {"x": image}, None), expected)
    visadapt.remove(tiny, "a")
    assert torch.equal(answer(tiny, {"x": image}, None), expected)
    visadapt.eject(tiny)
    assert anatomy(tiny) == before


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_parametrization_below_comes_off(tiny, image, method) -> None:
    parametrize.register_parametrization(tiny.layer1[0].conv1, "weight", Half())
    visadapt.inject(tiny.eval(), method, task="a", norms="frozen", where="conv3x3")
    stir(tiny, "a")
    expected = {task: answer(tiny, {"x": image}, task) for task in (None, "a")}
    parametrize.remove_parametrizations(tiny.layer1[0].conv1, "weight")
    tiny.layer1[0].conv1.weight.requires_grad_(False)
    for task, each in expected.items():
        assert torch.equal(answer(tiny, {"x": image}, task), each)
    visadapt.eject(tiny)
    assert type(tiny.layer1[0].conv1) is nn.Conv2d
    assert torch.equal(tiny(image), expected[None])


def test_a_parametrization_of_weights_that_a_task_owns_does_not_come_off(tiny, image) -> None:
    parametrized(tiny.eval())
    visadapt.inject(tiny, visadapt.Full(), task="a", norms="frozen")
    parametrize.remove_parametrizations(tiny.conv1, "weight")
    with pytest.raises(VisadaptError, match=r"conv1\.parametrizations was removed after the inject"):
        tiny(image)


def test_a_parametrization_comes_off_a_frozen_host(tiny, image) -> None:
    """Put on after the inject and taken off again, it leaves the host that it found."""
    visadapt.inject(tiny, m=2, task="a", norms="full")
    stir(tiny, "a")
    expected, before = answer(tiny, {"x": image}, "a"), anatomy(tiny)
    norm = tiny.layer1[0].bn1
    parametrize.register_parametrization(norm, "weight", Half())
    parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
    norm.weight.requires_grad_(False)
    assert anatomy(tiny)["classes"] == before["classes"]
    assert torch.equal(answer(tiny, {"x": image}, "a"), expected)


def test_a_merged_copy_keeps_a_parametrization(tiny, image) -> None:
    visadapt.inject(tiny, m=2, task="a", norms="full", where="layer4*", num_classes=3)
    stir(tiny, "a")
    parametrizations.weight_norm(tiny.conv1)
    expected = answer(tiny, {"x": image}, "a")
    copied = copy.deepcopy(tiny)
    assert torch.equal(answer(copied, {"x": image}, "a"), expected)
    assert parametrize.is_parametrized(copied.conv1)
    with pytest.raises(Exception, match=r"only supported through state_dict|pickle"):
        pickle.dump(tiny, io.BytesIO())


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("take", ["remove", "eject", "unlean"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_fully_shard_survives(mesh, image, take) -> None:
    model = ZOO["tiny/resnet"].make()
    for task in "ab":
        visadapt.inject(model, m=2, task=task, norms="frozen")
        stir(model, task)
    if take == "unlean":
        visadapt.lean(model)
    expected = {task: answer(model, {"x": image}, task) for task in (None, "a", "b")}
    sharded = [model.layer1[0].bn2, *model.layer1, *model.layer2]
    for module in (*sharded, model):
        fully_shard(module, mesh=mesh)
    if take != "unlean":
        torch.testing.assert_close(answer(model, {"x": image}, "a"), expected["a"])
    if take == "remove":
        for task in "ab":
            visadapt.remove(model, task)
    elif take == "eject":
        visadapt.eject(model)
    else:
        visadapt.unlean(model)
    assert all(isinstance(module, FSDPModule) for module in (*sharded, model))
    torch.testing.assert_close(answer(model, {"x": image}, None), expected[None])
    if take == "unlean":
        torch.testing.assert_close(answer(model, {"x": image}, "b"), expected["b"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_mixed_training_goes_on_when_known_batches_are_sharded(mesh) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=3, task=task, example=x, where="linear")
        stir(model, task, seed)
    model.train()
    with visadapt.using(model, list("aabab")):
        expected = model(x).detach()
        # the hooks of the inner ones replace what they are shown, as it needs a gradient
        for module in (model[1][0], model[1][2], model):
            fully_shard(module, mesh=mesh)
        for _ in range(2):
            out = model(x)
            torch.testing.assert_close(out, expected)
            out.sum().backward()
    # of other sizes, it would have to be copied
    refused = pytest.raises(
        VisadaptError, match="FSDP2 lets no sharded model be copied: run a mixed batch of each size"
    )
    with refused, visadapt.using(model, list("abba")):
        model(x[:4])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", [DAN(bits=4), DAN(), Bottleneck(m=2)], ids=str)
def test_loading_a_backbone_leaves_tasks_as_they_are(tiny, image, method, assign) -> None:
    """What is trained, unrounded, and the very tensors that an optimiser holds."""
    visadapt.inject(tiny, method, task="a", norms="full", num_classes=3)
    stir(tiny, "a")
    tensors = {name: (p, p.detach().clone()) for name, p in visadapt.named_parameters(tiny, "a")}
    other = ZOO["tiny/resnet"].make(seed=5)
    tiny.load_state_dict(other.state_dict(), assign=assign)
    for name, p in visadapt.named_parameters(tiny, "a"):
        assert p is tensors[name][0]
        assert torch.equal(p, tensors[name][1])
    assert same(bare_part(snapshot(tiny)), snapshot(other))
    assert torch.equal(answer(tiny, {"x": image}, None), answer(other, {"x": image}))
    visadapt.activate(tiny, "a")
    step(tiny, {"x": image})
    assert all(p.grad is not None for p, _ in tensors.values())
