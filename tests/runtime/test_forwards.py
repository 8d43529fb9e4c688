"""A module's own forward (accelerate's hooks, patches) runs with a task's parts around it, or is refused by name."""

import copy
import functools
import types
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import nn

import visadapt
from tests.models import anatomy, answer, output, same, snapshot, step, stir
from visadapt import VisadaptError

SMALL = ["tiny/resnet", "tiny/vgg_bn", "transformers/bert", "transformers/distilbert"]
pytestmark = pytest.mark.parametrize("member", SMALL, indirect=True, scope="session")


def wrapped(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def partially(module):
    module.forward = functools.update_wrapper(functools.partial(type(module).forward, module), module.forward)


def patched(module):
    """The same function again, as a new method of this one module."""
    function = module.forward.__func__
    module.forward = types.MethodType(lambda self, *args, **kwargs: function(self, *args, **kwargs), module)


def hooked(module):
    add_hook_to_module(module, ModelHook())
    add_hook_to_module(module, ModelHook(), append=True)


GIVEN = [wrapped, partially, patched, hooked]


def inject(model):
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        visadapt.inject(model, m=4, task=task, norms="frozen", head="frozen")
        stir(model, task, seed)


def hosts(model):
    return [m for m in model.modules() if "visadapt" in m._modules]


@pytest.mark.parametrize("give", GIVEN)
def test_parts_act_around_a_forward_given_before(member, inputs, give) -> None:
    plain, model = member.make(), member.make()
    inject(plain)
    for module in model.modules():
        give(module)
    before = anatomy(model)
    inject(model)
    for task in (None, "a", "b"):
        assert torch.equal(answer(model, inputs, task), answer(plain, inputs, task))
    assert same(snapshot(model), snapshot(plain))
    visadapt.eject(model)
    assert anatomy(model) == before
    assert torch.equal(answer(model, inputs), answer(plain, inputs, None))


@pytest.mark.parametrize("give", GIVEN)
def test_parts_act_around_a_forward_given_afterwards(member, inputs, give) -> None:
    model = member.make()
    inject(model)
    expected = {task: answer(model, inputs, task) for task in (None, "a", "b")}
    for module in (model, *hosts(model)):
        give(module)
    for task in expected:
        assert torch.equal(answer(model, inputs, task), expected[task])
    # once more around it, and a task that comes later
    for module in hosts(model):
        wrapped(module)
    visadapt.inject(model, m=2, task="c", norms="frozen", head="frozen")
    stir(model, "c")
    assert not torch.equal(answer(model, inputs, "c"), expected[None])
    for task in expected:
        assert torch.equal(answer(model, inputs, task), expected[task])
    step(model, inputs)
    assert any(p.grad is not None for p in visadapt.parameters(model, "c"))
    for task in "abc":
        visadapt.remove(model, task)
    assert torch.equal(answer(model, inputs, None), expected[None])
    visadapt.eject(model)
    assert torch.equal(answer(model, inputs), expected[None])
    inject(model)
    for task in expected:
        assert torch.equal(answer(model, inputs, task), expected[task])


def test_hooks_come_and_go(member, inputs) -> None:
    model = member.make()
    inject(model)
    expected = {task: answer(model, inputs, task) for task in (None, "a")}
    before = anatomy(model)
    for module in hosts(model):
        hooked(module)
    remove_hook_from_module(model, recurse=True)
    assert anatomy(model) == before
    for task in expected:
        assert torch.equal(answer(model, inputs, task), expected[task])
    hosted = hosts(model)[0]
    wrapped(hosted)
    del hosted.forward
    assert anatomy(model) == before


def test_a_forward_that_calls_nothing_of_ours_is_the_hosts_own(member, inputs) -> None:
    model = member.make()
    inject(model)
    host = hosts(model)[0]
    zeros = {}
    host.register_forward_hook(lambda module, args, out: zeros.setdefault("out", out))
    with torch.no_grad(), visadapt.using(model, None):
        output(model, inputs)
    nothing = torch.zeros_like(zeros["out"] if isinstance(zeros["out"], torch.Tensor) else zeros["out"][0])
    host.forward = lambda *args, **kwargs: nothing if isinstance(zeros["out"], torch.Tensor) else (nothing,)
    outs = [answer(model, inputs, task) for task in (None, "a", "b")]
    assert not any(torch.equal(x, y) for x, y in ((outs[0], outs[1]), (outs[0], outs[2]), (outs[1], outs[2])))


def test_a_copy_has_forwards_of_its_own(member, inputs) -> None:
    """deepcopy binds hooks to the copy; a task's copy of a norm or head likewise."""
    model = member.make()
    for module in model.modules():
        hooked(module)
    visadapt.inject(model, m=4, task="a", num_classes=3, norms="full")
    stir(model, "a")
    twin = copy.deepcopy(model)
    expected = answer(model, inputs, "a")
    stir(model, "a", 5)
    assert torch.equal(answer(twin, inputs, "a"), expected)
    assert not torch.equal(answer(model, inputs, "a"), expected)
    model.train()
    step(model, inputs)
    head = [p for name, p in visadapt.named_parameters(model, "a") if ".head." in f".{name}"]
    norms = [p for name, p in visadapt.named_parameters(model, "a") if ".norm." in f".{name}"]
    assert all(p.grad is not None for p in (*head, *norms))


def test_what_no_copy_can_have_is_refused_by_name(member, inputs) -> None:
    model = member.make()
    wrapped(model.get_submodule(member.norm))
    before = anatomy(model)
    with pytest.raises(VisadaptError, match=f"^{member.norm} has a forward of its own"):
        visadapt.inject(model, m=4, norms="affine", head="frozen")
    assert anatomy(model) == before
    visadapt.inject(model, m=4, norms="frozen", head="frozen")


def test_offloaded_weights_are_refused_and_may_be_offloaded_afterwards(member, inputs) -> None:
    model = member.make()
    inject(model)
    expected = {task: answer(model, inputs, task) for task in (None, "a", "b")}
    cpu_offload(model, execution_device=torch.device("cpu"))
    for task in expected:
        # weights at other addresses: on some processors, products then round differently
        torch.testing.assert_close(answer(model, inputs, task), expected[task], rtol=1e-6, atol=1e-6)
    with pytest.raises(VisadaptError, match=r"are offloaded.*Inject first"):
        visadapt.inject(model, m=4, task="c")
    other = cpu_offload(member.make(), execution_device=torch.device("cpu"))
    before = anatomy(other)
    with pytest.raises(VisadaptError, match=r"are offloaded.*Inject first"):
        visadapt.inject(other, m=4, task="c")
    assert anatomy(other) == before


@pytest.mark.parametrize("first", [True, False])
def test_dispatch(member, inputs, first) -> None:
    plain, model = member.make(), member.make()
    visadapt.inject(plain, m=4, task="a", num_classes=3)
    if first:
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    visadapt.inject(model, m=4, task="a", num_classes=3)
    if not first:
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    for each in (plain, model):
        torch.manual_seed(0)
        for p in visadapt.parameters(each, "a"):
            nn.init.normal_(p, 0.1, 0.1)
    assert torch.equal(answer(model, inputs, "a"), answer(plain, inputs, "a"))


@pytest.fixture
def _accelerate_forgets() -> Iterator[None]:
    """Forget accelerate's settings, which belong to the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate_forgets")
def test_a_prepared_model(member, inputs) -> None:
    model = member.make()
    inject(model)
    expected = {task: answer(model, inputs, task) for task in (None, "a", "b")}
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    for task in expected:
        torch.testing.assert_close(answer(prepared, inputs, task).float(), expected[task], rtol=0.2, atol=0.2)
    kept = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for task in expected:
        assert torch.equal(answer(kept, inputs, task), expected[task])
