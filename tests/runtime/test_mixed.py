"""Mixed batches: every sample has the task of its own, and gets what that task alone would give it."""

from __future__ import annotations

import collections
import copy
import threading
from collections import Counter
from functools import cache

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

import visadapt
from tests.models import ZOO, Member, answer, enliven, output, stir
from tests.versions import compiled_whole
from visadapt import (
    DAN,
    SSF,
    TSA,
    AdaptFormer,
    Biases,
    Bottleneck,
    ConvAdapter,
    Full,
    Linear,
    LoRA,
    Norms,
    Parallel,
    Series,
    TopLayers,
    VisadaptError,
    using,
)
from visadapt.backbone.trace import call
from visadapt.methods import stacking

LIST = ["a", None, "b", "c", "a", "b"]


def timm_member(name: str, **options) -> Member:
    return Member(name, lambda: timm.create_model(name, pretrained=False, num_classes=10, **options), {})


EXTRA = {
    member.name: member
    for member in (
        # NHWC blocks, windows (more rows than samples), tokens of images, norms that carry an activation
        timm_member("convnext_atto", dims=(8, 12, 16, 24), depths=(1, 1, 1, 1)),
        timm_member(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4
        ),
        timm_member("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2),
        timm_member("mobilenetv2_035"),
    )
}
SMALL = ["tiny/resnet", "tiny/vgg_bn", *EXTRA, *(name for name, m in ZOO.items() if m.text)]
BIG = ["torchvision/resnet18", "torchvision/resnext50_32x4d", "timm/seresnet50"]


def members(*names):
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in BIG)) for n in names])


@cache
def shared(name: str) -> nn.Module:
    """Three tasks that differ in all that tasks can differ in; only looked at, never changed."""
    model = {**ZOO, **EXTRA}[name].make()
    visadapt.inject(model, m=4, task="a", num_classes=5, norms="affine")
    visadapt.inject(model, m=4, task="b", num_classes=2, norms="full")
    visadapt.inject(model, Bottleneck(m=2, activation="relu"), task="c", head="frozen", norms="frozen")
    for seed, task in enumerate("abc"):
        stir(model, task, seed)
    for name, buffer in model.named_buffers():
        if ".visadapt.b." in name and name.endswith("running_mean"):
            buffer.add_(0.1)
    return model.eval()


def rows(inputs, index):
    return {name: value[index] for name, value in inputs.items()}


def agree(found, expected, tolerance=1e-5) -> None:
    scale = max(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@torch.no_grad()
def check(model, inputs, tasks, tolerance=1e-5) -> None:
    """The mixed batch against each task alone on its own samples."""
    with using(model, tasks):
        logits = output(model, inputs)
    assert len(logits) == len(tasks)
    for task in dict.fromkeys(tasks):
        index = [i for i, t in enumerate(tasks) if t == task]
        with using(model, task):
            alone = output(model, rows(inputs, index))
        agree(logits[index, : alone.shape[1]], alone, tolerance)
        assert (logits[index, alone.shape[1] :] == -torch.inf).all()


@members(*SMALL, *BIG)
def test_every_sample_gets_what_its_task_alone_gives(name) -> None:
    member = {**ZOO, **EXTRA}[name]
    inputs = member.inputs(n=len(LIST))
    model = shared(name) if name in SMALL else None
    if model is None:
        model = member.make()
        for seed, task in enumerate("abc"):
            visadapt.inject(model, m=4, task=task, norms=("affine", "full", "frozen")[seed], num_classes=3 + seed)
            stir(model, task, seed)
    check(model, inputs, LIST)
    # the very tasks in another order, and one for all
    check(model, inputs, LIST[::-1])
    check(model, inputs, ["b"] * len(LIST))
    check(model, inputs, [None] * len(LIST))


@settings(max_examples=20)
@given(tasks=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7))
def test_any_list_in_any_order(tasks) -> None:
    check(shared("tiny/resnet"), ZOO["tiny/resnet"].inputs(n=len(tasks)), tasks)


@settings(max_examples=15)
@given(tasks=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=5))
def test_any_list_in_any_order_of_texts(tasks) -> None:
    check(shared("transformers/bert"), ZOO["transformers/bert"].inputs(n=len(tasks)), tasks)


IMAGES = [
    Bottleneck(m=3, depthwise=True),
    Parallel(),
    Parallel(rank=2),
    Series(),
    Series(norm=False),
    TSA(align=True),
    DAN(),
    DAN(diagonal=True, bits=8),
    ConvAdapter(),
    ConvAdapter(scheme="conv-sequential"),
    ConvAdapter(scheme="residual-parallel"),
    ConvAdapter(scheme="residual-sequential"),
    SSF(),
    LoRA(r=2),
    Linear(),
    Norms(),
    Biases(),
    TopLayers(2),
    Full(),
]
TEXTS = [
    SSF(),
    LoRA(r=2),
    AdaptFormer(m=3),
    Bottleneck(m=3, activation=None),
    Biases(),
    TopLayers(1),
    Full(),
    Norms(),
    Linear(),
]


def policy(method) -> str:
    return "frozen" if isinstance(method, Linear | Biases) else "affine"


@pytest.mark.parametrize("method", IMAGES, ids=str)
def test_every_method_beside_every_other_on_images(method, tiny) -> None:
    norms = policy(method)
    visadapt.inject(tiny, method, task="one", num_classes=4, norms=norms)
    visadapt.inject(tiny, method, task="two", num_classes=6, norms=norms)
    visadapt.inject(tiny, Bottleneck(m=3), task="other", norms="full")
    for seed, task in enumerate(visadapt.tasks(tiny)):
        stir(tiny, task, seed)
    inputs = ZOO["tiny/resnet"].inputs(n=6)
    check(tiny, inputs, ["one", "two", "one", "two", "two", "one"])
    check(tiny, inputs, ["two", "other", "one", None, "other", "two"])


@pytest.mark.parametrize("method", TEXTS, ids=str)
def test_every_method_beside_every_other_on_texts(method) -> None:
    member = ZOO["transformers/bert"]
    model = member.make()
    visadapt.inject(model, method, task="one", num_classes=4, norms=policy(method))
    visadapt.inject(model, method, task="two", num_classes=6, norms=policy(method))
    visadapt.inject(model, Bottleneck(m=3), task="other")
    for seed, task in enumerate(visadapt.tasks(model)):
        stir(model, task, seed)
    check(model, member.inputs(n=5), ["two", "other", "one", None, "two"])
    check(model, member.inputs(n=5), ["two", "one", "one", "two", "one"])


def test_several_methods_in_one_task_act_in_their_order(tiny) -> None:
    for task, methods in {"a": [Parallel(), SSF(), Bottleneck(m=2)], "b": [SSF(), Parallel(), Series()]}.items():
        for method in methods:
            visadapt.inject(tiny, method, task=task, norms="affine")
        stir(tiny, task)
    check(tiny, ZOO["tiny/resnet"].inputs(n=4), ["b", "a", "b", None])


@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
@pytest.mark.parametrize("norms", ["frozen", "affine", "full"])
def test_training_gives_each_task_the_gradients_and_statistics_of_training_alone(name, norms) -> None:
    member = ZOO[name]
    model = member.make()
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=4, task=task, num_classes=3 + seed, norms=norms)
        stir(model, task, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model)
    inputs = member.inputs(n=7)
    tasks = ["b", "a", "b", "a", "a", "b", "a"]
    labels = torch.arange(7) % 3

    def learn(net, choice, index):
        with using(net, choice):
            F.cross_entropy(output(net, rows(inputs, index)), labels[index], reduction="sum").backward()

    learn(model.train(), tasks, list(range(7)))
    for task in "ab":
        learn(alone.train(), task, [i for i, t in enumerate(tasks) if t == task])
    for task in "ab":
        expected = dict(visadapt.named_parameters(alone, task))
        for key, p in visadapt.named_parameters(model, task):
            assert (p.grad is None) == (expected[key].grad is None), key
            if p.grad is not None:
                agree(p.grad, expected[key].grad, 2e-5)
    state = alone.state_dict()
    assert any("running_mean" in key and ".visadapt." in key for key in state) == (
        norms == "full" and "bert" not in name
    )
    for key, value in model.state_dict().items():
        agree(value.double(), state[key].double())


@pytest.mark.parametrize("method", [Series(), Parallel(), DAN(), ConvAdapter(), SSF(), Full()], ids=str)
def test_every_method_trains_in_a_mixed_batch(method, tiny) -> None:
    for seed, task in enumerate("ab"):
        visadapt.inject(tiny, method, task=task, num_classes=3, norms="affine")
        stir(tiny, task, seed)
    alone = copy.deepcopy(tiny)
    inputs = ZOO["tiny/resnet"].inputs(n=5)
    tasks, labels = ["a", "b", "a", "b", "a"], torch.arange(5) % 3

    def learn(net, choice, index):
        with using(net, choice):
            F.cross_entropy(net(inputs["x"][index]), labels[index], reduction="sum").backward()

    learn(tiny.train(), tasks, list(range(5)))
    learn(alone.train(), "a", [0, 2, 4])
    learn(alone.train(), "b", [1, 3])
    for task in "ab":
        expected = visadapt.parameters(alone, task)
        for mine, theirs in zip(visadapt.parameters(tiny, task), expected, strict=True):
            agree(mine.grad, theirs.grad, 5e-5)
    for mine, theirs in zip(tiny.buffers(), alone.buffers(), strict=True):
        agree(mine.double(), theirs.double())


def test_norms_give_the_very_bits_of_each_task_alone(tiny) -> None:
    for seed, task in enumerate("ab"):
        visadapt.inject(tiny, Norms(), task=task, norms=("affine", "full")[seed])
        stir(tiny, task, seed)
    norm = tiny.get_submodule("layer2.0.bn1")
    seen = []
    handle = norm.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone())))
    tasks = ["b", None, "a", "b", "a"]
    with torch.no_grad(), using(tiny, tasks):
        tiny(ZOO["tiny/resnet"].inputs(n=5)["x"])
    handle.remove()
    ((x, mixed),) = seen
    for i, task in enumerate(tasks):
        with using(tiny, task):
            assert torch.equal(mixed[i], norm(x)[i])


def test_heads_of_different_widths_are_padded_and_split(tiny, image) -> None:
    for task, width in {"narrow": 2, "wide": 12}.items():
        visadapt.inject(tiny, m=2, task=task, num_classes=width)
    visadapt.inject(tiny, m=2, task="kept", head="frozen")
    tasks = ["wide", "kept", "narrow", "wide", None]
    x = ZOO["tiny/resnet"].inputs(n=5)["x"]
    with torch.no_grad(), using(tiny, tasks):
        logits = tiny(x)
    assert logits.shape == (5, 12)
    assert (logits.isinf().sum(1)).tolist() == [0, 2, 10, 0, 2]
    found = visadapt.split(tiny, logits, tasks)
    assert {task: tuple(own.shape) for task, own in found.items()} == {
        "wide": (2, 12),
        "kept": (1, 10),
        "narrow": (1, 2),
        None: (1, 10),
    }
    assert torch.equal(found["wide"], logits[[0, 3]])
    assert not any(own.isinf().any() for own in found.values())
    # no task's loss sees another's columns
    assert F.cross_entropy(logits, torch.tensor([11, 9, 1, 0, 3])).isfinite()


def test_split_refuses_what_does_not_fit(tiny) -> None:
    visadapt.inject(tiny, m=2, task="flowers", num_classes=3)
    with pytest.raises(VisadaptError, match="2 tasks for 3 rows"):
        visadapt.split(tiny, torch.zeros(3, 3), ["flowers", "flowers"])
    with pytest.raises(VisadaptError, match="no task 'flower'; did you mean 'flowers'"):
        visadapt.split(tiny, torch.zeros(1, 3), ["flower"])


def test_a_list_of_the_wrong_length_or_of_unknown_tasks_is_refused(tiny, image) -> None:
    visadapt.inject(tiny, m=2, task="flowers")
    for tasks in (["flowers"], ["flowers"] * 3, [None] * 4, ["flowers", None, "flowers"]):
        # an image has as many planes as three tasks: the batch may have been meant to be taken apart along them
        said = rf"{len(tasks)} tasks .* batch (of 2|that ResNet does not treat as {len(tasks)} samples)"
        with pytest.raises(VisadaptError, match=said), using(tiny, tasks):
            tiny(image)
    with pytest.raises(VisadaptError, match="no task 'flower'"), using(tiny, ["flowers", "flower"]):
        pass
    with pytest.raises(VisadaptError, match="a list with one name per sample"), using(tiny, []):
        pass
    # an inner module called by itself takes as many rows as tasks
    for rows in (1, 3, 4):
        with pytest.raises(VisadaptError, match="outside of the model's own forward"), using(tiny, ["flowers", None]):
            tiny.layer1[0].bn2(torch.randn(rows, 8, 4, 4))
    visadapt.activate(tiny, ["flowers"] * 3)
    said = r"3 tasks .* batch that ResNet does not treat as 3 samples .*treats it as 2 samples"
    with pytest.raises(VisadaptError, match=said):
        tiny(image)


def test_texts_of_the_wrong_length_are_refused() -> None:
    model = shared("transformers/bert")
    with pytest.raises(VisadaptError, match=r"3 tasks .* batch of 2"), using(model, ["a", "b", None]):
        model(**ZOO["transformers/bert"].inputs())


def test_threads_have_their_own_lists() -> None:
    model = shared("tiny/resnet")
    x = ZOO["tiny/resnet"].inputs(n=4)["x"]
    lists = [["a", "b", "c", None], ["c", "c", "a", "a"], "b", [None, "a", "b", "b"]]

    @torch.no_grad()
    def ask(tasks):
        with using(model, tasks):
            return model(x)

    expected = [ask(tasks) for tasks in lists]
    wrong: list[int] = []
    gate = threading.Barrier(len(lists))

    def run(number):
        gate.wait()
        found = [ask(lists[number]) for _ in range(5)]
        wrong.extend(number for each in found if not torch.equal(each, expected[number]))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_activate_takes_a_list_and_removing_one_of_its_tasks_clears_it(tiny, image) -> None:
    visadapt.inject(tiny, m=2, task="a")
    visadapt.inject(tiny, m=2, task="b")
    bare = answer(tiny, {"x": image})
    visadapt.activate(tiny, ["a", "b"])
    assert visadapt.active(tiny) == ("a", "b")
    assert tiny(image).shape == (2, 10)
    visadapt.remove(tiny, "b")
    assert visadapt.active(tiny) is None
    assert torch.equal(tiny(image), bare)
    visadapt.eject(tiny)
    assert not tiny._forward_hooks
    assert not tiny._forward_pre_hooks


def test_rows_are_made_once_for_a_pattern_and_serve_training_after_inference_mode(tiny, image, monkeypatch) -> None:
    visadapt.inject(tiny, m=2, task="a", num_classes=3, norms="full")
    visadapt.inject(tiny, m=2, task="b", num_classes=4)
    made: Counter[object] = Counter()
    plain = stacking.Rows.__init__

    def counting(self, *args):
        made[args] += 1
        plain(self, *args)

    monkeypatch.setattr(stacking, "_KEPT", {})
    monkeypatch.setattr(stacking.Rows, "__init__", counting)
    with torch.inference_mode(), using(tiny, ["b", "a"]):
        tiny(image)
    with using(tiny.train(), ["b", "a"]):
        tiny(image)[:, :3].sum().backward()
    assert set(made.values()) == {1}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), using(tiny, ["a", "b", "b"]):
        tiny(torch.randn(3, 3, 64, 64))
    # and no tracer's stand-ins for tensors
    assert all(type(index) is torch.Tensor for kept in stacking._KEPT.values() for index in kept._indices.values())
    for n in range(300):
        stacking.rows_for((0, 1) * (n + 1), 1, torch.device("cpu"))
    assert len(stacking._KEPT) <= 256


def test_the_rows_of_all_heads_are_taken_at_once(tiny, image) -> None:
    for i in range(6):
        visadapt.inject(tiny, Linear(), task=f"t{i}", num_classes=3 + i)
        stir(tiny, f"t{i}")

    def operators(names: list[str]) -> Counter[str]:
        x = image[:1].repeat(len(names), 1, 1, 1)
        with torch.no_grad(), using(tiny.eval(), names):
            tiny(x)
            with profile() as profiler:
                tiny(x)
        return Counter(event.name for event in profiler.events())

    two, six = operators(["t0", "t1"] * 3), operators([f"t{i}" for i in (*range(6), *range(6))])
    assert six["aten::linear"] == two["aten::linear"] + 4 == 6
    assert six["aten::index_select"] == two["aten::index_select"]


def test_parameters_changed_between_two_batches_are_seen(tiny, image) -> None:
    for task in "ab":
        visadapt.inject(tiny, m=2, task=task)
        stir(tiny, task)
    for change in (lambda p: p.data.add_(0.1), lambda p: setattr(p, "data", p.data + 0.1)):
        check(tiny, {"x": image}, ["a", "b"])
        for p in visadapt.parameters(tiny, "a"):
            change(p)
    check(tiny, {"x": image}, ["a", "b"])


@pytest.mark.parametrize("name", ["tiny/resnet", "convnext_atto", "transformers/bert"])
def test_half_precision_backbone(name) -> None:
    member = {**ZOO, **EXTRA}[name]
    model = member.make().to(torch.bfloat16)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=4, task=task, num_classes=3, norms=("affine", "full")[seed])
        stir(model, task, seed)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in member.inputs(n=4).items()}
    check(model, inputs, ["b", "a", None, "a"], tolerance=0.05)


def test_autocast_and_channels_last() -> None:
    model = shared("tiny/resnet")
    inputs = ZOO["tiny/resnet"].inputs(n=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, inputs, LIST, tolerance=0.05)
        check(shared("transformers/bert"), ZOO["transformers/bert"].inputs(n=6), LIST, tolerance=0.05)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = inputs["x"].to(memory_format=torch.channels_last)
    check(last, {"x": x}, LIST)
    seen = []
    last.layer2[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), using(last, LIST):
        last(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny/resnet", "transformers/bert"])
def test_a_mixed_batch_compiles_as_one_graph(name) -> None:
    torch._dynamo.reset()
    model, inputs = shared(name), ZOO[name].inputs(n=6)
    with torch.no_grad(), using(model, LIST):
        expected = output(model, inputs)
        compiled = compiled_whole(model, backend="eager")
        assert torch.equal(output(compiled, inputs), expected)
    torch._dynamo.reset()


def test_a_loss_of_transformers_is_the_mean_over_the_samples() -> None:
    model, inputs = shared("transformers/bert"), ZOO["transformers/bert"].inputs(n=4)
    labels = torch.tensor([4, 1, 2, 0])
    tasks = ["a", "b", None, "a"]
    with torch.no_grad(), using(model, tasks):
        out = model(**inputs, labels=labels)
    agree(out.loss, F.cross_entropy(out.logits, labels))


def test_a_head_that_is_no_single_layer_has_no_width_to_follow() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    decoder = {f"decoder_{key}": value for key, value in sizes.items()}
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=16)
    model = enliven(transformers.ViTMAEForPreTraining(config)).eval()
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 4)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=2, task=task, norms="frozen", example={"pixel_values": images})
        stir(model, task, seed)
    found = {}
    with torch.no_grad():
        for task in ("a", "b", "aba"):
            with using(model, list(task) if len(task) > 1 else task):
                found[task] = model(pixel_values=images, noise=noise).logits
    for row, task in enumerate("aba"):
        agree(found["aba"][row], found[task][row])
        assert not torch.allclose(found["a"][row], found["b"][row], atol=1e-3)


@pytest.mark.parametrize("kind", [list, collections.namedtuple("Pair", "value size")._make], ids=["list", "namedtuple"])
def test_outputs_of_hosts_keep_their_type(kind) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return kind((x + self.fc(self.conv(x).relu()), len(x)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3, 2), Block(), nn.Linear(8, 3)

        def forward(self, x):
            out = self.block(self.stem(x))
            assert type(out) is type(kind((0, 0)))
            return self.fc(out[0].mean((2, 3)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 3, 16, 16)
    for seed, task in enumerate("ab"):
        visadapt.inject(model, m=2, task=task, where="block", example=x)
        stir(model, task, seed)
    with torch.no_grad(), using(model, list("aba")):
        mixed = model(x)
    for row, task in enumerate("aba"):
        agree(mixed[row : row + 1], answer(model, {"x": x[row : row + 1]}, task))


def test_a_tuple_of_arguments_goes_to_each_group(tiny) -> None:
    """Hosts whose inputs are several tensors, with and without a row a sample, by position and by keyword."""

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, y, *, shift, table):
            return self.fc(x + y) + shift, table

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Joint()

        def forward(self, x, y, shift):
            return self.inner(x, y, shift=shift, table=torch.zeros(3, 4))[0]

    model = enliven(Net()).eval()
    example = (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))
    for task in "ab":
        visadapt.inject(model, Biases(), task=task, example=example)
        visadapt.inject(model, Bottleneck(m=2), task=task, where="inner", example=example)
        stir(model, task, ord(task))
    given = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 3)
    with torch.no_grad():
        with using(model, ["b", "a", "b", None]):
            mixed = call(model, given)
        for i, task in enumerate(["b", "a", "b", None]):
            with using(model, task):
                agree(mixed[i], call(model, given)[i])
