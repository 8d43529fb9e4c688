"""Promise 6: an injected model is a module like any other to the rest of torch."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import visadapt
from tests.models import ZOO, answer, bare_part, output, same, snapshot, step, stir, train
from tests.versions import ONE_GRAPH, compiled_whole
from visadapt import Bottleneck

ROOT = Path(__file__).parents[1]
SMALL = ["tiny/resnet", "tiny/vgg_bn", *(name for name, m in ZOO.items() if m.text)]


def members(*names):
    return pytest.mark.parametrize("member", names, indirect=True, scope="session")


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture
def adapted(model, inputs):
    """Two tasks that are not the identity, and their answers."""
    visadapt.inject(model, m=4, task="a", norms="affine", num_classes=5)
    visadapt.inject(model, m=2, task="b", norms="full")
    for seed, task in enumerate("ab"):
        stir(model, task, seed)
    return {task: answer(model, inputs, task) for task in (None, "a", "b")}


@members(*SMALL, "torchvision/resnet18")
def test_deepcopy_is_independent(model, inputs, adapted) -> None:
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert visadapt.active(twin) == "b"
    state = snapshot(model)
    for task, expected in adapted.items():
        assert torch.equal(answer(twin, inputs, task), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    train(twin, "a", inputs)
    visadapt.activate(twin, None)
    visadapt.remove(twin, "b")
    visadapt.inject(twin, m=3, task="c")
    assert visadapt.active(model) == "b"
    assert list(visadapt.tasks(model)) == ["a", "b"]
    assert same(model.state_dict(), state)
    for task, expected in adapted.items():
        assert torch.equal(answer(model, inputs, task), expected)
    with visadapt.using(model, "a"):
        assert visadapt.active(twin) == "c"
    visadapt.eject(twin)
    assert same(twin.state_dict(), bare_part(state))


@members(*SMALL)
def test_a_whole_model_pickles(model, inputs, adapted) -> None:
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    for task, expected in adapted.items():
        assert torch.equal(answer(twin, inputs, task), expected)
    train(twin, "a", inputs, steps=1)
    for task, expected in adapted.items():
        assert torch.equal(answer(model, inputs, task), expected)
    visadapt.eject(twin)
    assert torch.equal(answer(twin, inputs), adapted[None])


@members(slow("tiny/resnet"))
def test_a_pickled_model_opens_in_another_process(model, member, inputs, adapted, tmp_path) -> None:
    torch.save(model, tmp_path / "model.pt")
    torch.save(adapted["a"], tmp_path / "a.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(f'{sys.argv[1]}/model.pt', weights_only=False)\n"
        "import visadapt\n"
        "from tests.models import ZOO, answer\n"
        f"found = answer(model, ZOO[{member.name!r}].inputs(), 'a')\n"
        "assert torch.equal(found, torch.load(f'{sys.argv[1]}/a.pt'))\n"
        "visadapt.inject(model, m=2, task='c')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


@contextmanager
def activated(model, task):
    visadapt.activate(model, task)
    yield


@pytest.fixture
def dynamo(model) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # torch's own mark on a module that it compiled
    vars(model).pop("_is_torch_compile", None)


@members("tiny/vgg_bn", slow("transformers/bert"))
@pytest.mark.parametrize("choose", [visadapt.using, activated], ids=["using", "activate"])
@pytest.mark.usefixtures("dynamo")
@ONE_GRAPH
def test_compile_makes_one_frame_a_task(model, inputs, adapted, choose) -> None:
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for frames, task in enumerate(("a", "b", None), start=1):
            with choose(model, task):
                assert torch.equal(output(compiled, inputs), adapted[task])
            assert counter.frame_count == frames
        for task in ("a", None, "b", "a"):
            with choose(compiled, task):
                assert torch.equal(output(compiled, inputs), adapted[task])
    assert counter.frame_count == 3


@members(slow("tiny/vgg_bn"))
@pytest.mark.usefixtures("dynamo")
@ONE_GRAPH
def test_compile_with_more_tasks_than_torchs_limit(model, inputs) -> None:
    """torch gives up at eight frames unless told how many there will be."""
    names = [f"t{i}" for i in range(11)]
    for seed, name in enumerate(names):
        visadapt.inject(model, m=1, task=name, norms="frozen", where=[0, 7])
        stir(model, name, seed)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, recompile_limit=len(names))
    for _ in range(2):
        for name in names:
            with torch.no_grad(), visadapt.using(model, name):
                assert torch.equal(output(compiled, inputs), output(model, inputs))
    assert counter.frame_count == len(names)


@members(slow("tiny/vgg_bn"), slow("transformers/bert"))
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_has_the_gradients_of_the_eager_one(model, inputs) -> None:
    visadapt.inject(model, Bottleneck(m=4, init_std=0.1), norms="affine", num_classes=3)
    step(model, inputs)
    eager = {name: p.grad for name, p in visadapt.named_parameters(model, "default")}
    model.zero_grad()
    step(compiled_whole(model, backend="aot_eager"), inputs)
    for name, p in visadapt.named_parameters(model, "default"):
        torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-5)


@members("tiny/vgg_bn", slow("transformers/bert"), slow("torchvision/resnet18"))
def test_export_holds_the_active_task(model, inputs, adapted) -> None:
    model.eval()
    for task, expected in adapted.items():
        visadapt.activate(model, task)
        arguments = ((inputs["x"],), None) if "x" in inputs else ((), inputs)
        program = torch.export.export(model, *arguments, strict=False)
        # an exported graph has a convolution where a product is quicker: on some processors these round differently
        torch.testing.assert_close(output(program.module(), inputs), expected)


LOW = [torch.bfloat16, torch.float16]


@members(*SMALL)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_a_half_precision_backbone_has_adapters_in_fp32(member, inputs, dtype, norms) -> None:
    model = member.make().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    before = answer(model, inputs)
    visadapt.inject(model, m=4, norms=norms, num_classes=3, task="new")
    visadapt.inject(model, m=4, norms=norms, head="frozen", task="kept")
    assert {p.dtype for p in visadapt.parameters(model, "new")} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "visadapt" not in name} == {dtype}
    after = answer(model, inputs, "kept")
    assert after.dtype == dtype
    if norms == "frozen":
        # an own norm computes in fp32, which rounds less, and so does an own head
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1)
    model.train()
    with visadapt.using(model, "new"):
        step(model, inputs)
    gradients = [p.grad for name, p in visadapt.named_parameters(model, "new") if ".up." in name]
    assert all(g is not None and g.any() and torch.isfinite(g).all() for g in gradients)


@members(*SMALL)
def test_autocast(model, inputs, adapted) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for task, expected in adapted.items():
            torch.testing.assert_close(answer(model, inputs, task).float(), expected, rtol=0.2, atol=0.2)
        model.train()
        with visadapt.using(model, "a"):
            step(model, inputs)
    gradients = [p.grad for p in visadapt.parameters(model, "a") if p.grad is not None]
    assert gradients
    assert {g.dtype for g in gradients} == {torch.float32}


@members(*SMALL)
def test_double_precision(member, inputs) -> None:
    model = member.make().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    before = answer(model, inputs)
    visadapt.inject(model, m=4, norms="full")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(answer(model, inputs, "default"), before)
    visadapt.inject(model, m=4, norms="full", task="b")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@members(*SMALL)
def test_moving_to_another_dtype_and_back_takes_the_tasks_along(model, inputs, adapted) -> None:
    twin = copy.deepcopy(model).double()
    assert {t.dtype for t in twin.state_dict().values() if t.is_floating_point()} == {torch.float64}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for task, expected in adapted.items():
        torch.testing.assert_close(answer(twin, wide, task).float(), expected, rtol=1e-4, atol=1e-4)
    twin.float()
    for task, expected in adapted.items():
        assert torch.equal(answer(twin, inputs, task), expected)


@members("tiny/resnet", "tiny/vgg_bn")
def test_channels_last(model, inputs, adapted) -> None:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = inputs["x"].to(memory_format=torch.channels_last)
    for task, expected in adapted.items():
        torch.testing.assert_close(answer(twin, {"x": x}, task), expected, rtol=1e-4, atol=1e-4)


@members(*SMALL)
def test_the_meta_device(model, member, inputs, adapted) -> None:
    """Planned without memory, then filled: from a checkpoint of the injected model, or from the task's file."""
    with torch.device("meta"):
        ghost = member.build().eval()
        visadapt.inject(ghost, m=4, task="a", norms="affine", num_classes=5)
        visadapt.inject(ghost, m=2, task="b", norms="full")
    assert all(p.is_meta for p in visadapt.parameters(ghost, "a"))
    assert visadapt.summary(ghost) == visadapt.summary(model)
    assert visadapt.sites(ghost) == visadapt.sites(model)
    ghost.to_empty(device="cpu")
    missing = ghost.load_state_dict(model.state_dict(), strict=True)
    assert not missing.missing_keys
    for name, buffer in model.named_buffers():
        if name not in model.state_dict() and "visadapt" not in name.split("."):
            ghost.get_buffer(name).copy_(buffer)
    for task, expected in adapted.items():
        assert torch.equal(answer(ghost, inputs, task), expected)


def test_a_task_on_the_meta_device_cannot_be_saved(tmp_path) -> None:
    with torch.device("meta"):
        model = visadapt.inject(ZOO["tiny/resnet"].build(), m=2, task="flowers")
    with pytest.raises(visadapt.VisadaptError, match="meta device"):
        visadapt.save(model, "flowers", tmp_path / "f")
    assert not list(tmp_path.iterdir())


@members("tiny/resnet", "transformers/bert")
def test_functional_call_and_swapped_parameters(model, inputs, adapted) -> None:
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    stirred = {name: p + 0.1 if ".visadapt.a." in name else p for name, p in state.items()}
    arguments = ((inputs["x"],), {}) if "x" in inputs else ((), inputs)
    with torch.no_grad(), visadapt.using(model, "a"):
        kept = torch.func.functional_call(model, state, *arguments)
        moved = torch.func.functional_call(model, stirred, *arguments)
    logits = [out if isinstance(out, torch.Tensor) else out.logits for out in (kept, moved)]
    assert torch.equal(logits[0], adapted["a"])
    assert not torch.equal(logits[1], adapted["a"])


@members("tiny/resnet")
def test_inference_mode_and_training_after_it(model, inputs) -> None:
    with torch.inference_mode():
        visadapt.inject(model, m=2)
        output(model, inputs)
    visadapt.eject(model)
    visadapt.inject(model, m=2)
    with torch.inference_mode():
        output(model, inputs)
    step(model, inputs)


@members("transformers/bert")
def test_gradient_checkpointing_gives_the_same_gradients(member, inputs) -> None:
    def gradients(checkpointed):
        model = visadapt.inject(member.make(), Bottleneck(m=4, init_std=0.1))
        if checkpointed:
            # its name until transformers 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.train()
        torch.manual_seed(0)
        step(model, inputs)
        return [p.grad for p in visadapt.parameters(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_in_backward_is_the_same_task(tiny, image, reentrant) -> None:
    """Checkpointing runs blocks once more in backward, where a using that ended, or of another thread, is not seen."""
    for task in "ab":
        visadapt.inject(tiny, Bottleneck(m=2, init_std=0.1), task=task)
    tiny.train()
    plain = copy.deepcopy(tiny)
    checkpoint = torch.utils.checkpoint.checkpoint
    layer = tiny.layer2.forward
    tiny.layer2.forward = lambda x: (
        checkpoint(layer, x, use_reentrant=reentrant) if torch.is_grad_enabled() else layer(x)
    )

    def gradients(model, inside):
        model.zero_grad()
        with visadapt.using(model, "a"):
            loss = model(image).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad for p in visadapt.parameters(model, "a")]

    expected = gradients(plain, inside=False)
    for found in (lambda: gradients(tiny, inside=True), lambda: gradients(visadapt.activate(tiny, "a"), inside=False)):
        for one, other in zip(found(), expected, strict=True):
            torch.testing.assert_close(one, other)
    visadapt.activate(tiny, "b")
    for one, other in zip(gradients(tiny, inside=False), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(p.grad is None for p in visadapt.parameters(tiny, "b"))


@members("transformers/bert")
def test_the_library_of_the_backbone_saves_it_as_ever(model, inputs, adapted, tmp_path) -> None:
    """save_pretrained of an ejected model is the vanilla one; from_pretrained knows nothing of adapters."""
    expected = adapted[None]
    visadapt.eject(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path), inputs), expected)


@pytest.mark.parametrize("norms", ["affine", "full"])
def test_distributed_data_parallel(tmp_path, norms) -> None:
    member = ZOO["tiny/resnet"]
    inputs = member.inputs()

    def gradients(wrap):
        torch.manual_seed(0)
        model = visadapt.inject(member.make(), m=2, task="a", norms=norms, num_classes=3)
        visadapt.inject(model, m=2, task="b")
        visadapt.trainable(model, "a")
        visadapt.activate(model, "a")
        model.train()
        for _ in range(2):
            step(wrap(model), inputs)
        return {name: p.grad for name, p in visadapt.named_parameters(model, "a")}

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = gradients(lambda model: model)
        found = gradients(nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_checkpoint_of_the_whole_injected_model_restores_it() -> None:
    """Backbone and tasks, into a model injected alike."""
    member = ZOO["tiny/resnet"]
    model = visadapt.inject(member.make(), m=2, task="a", norms="full", num_classes=3)
    stir(model, "a")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = visadapt.inject(member.make(seed=9), m=2, task="a", norms="full", num_classes=3)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(answer(other, member.inputs(), "a"), answer(model, member.inputs(), "a"))
