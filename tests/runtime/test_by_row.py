"""Compiled mixed batches: one graph for every composition of the same sizes."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnet import Bottleneck as ResNetBottleneck
from torch import nn
from torch._dynamo.testing import CompileCounter

import visadapt
from tests.models import ZOO, enliven, output, short, stir
from tests.versions import ONE_GRAPH, compiled_whole
from visadapt import (
    DAN,
    SSF,
    TSA,
    AdaptFormer,
    Bottleneck,
    ConvAdapter,
    DoRA,
    Ladder,
    LoRA,
    Mona,
    Parallel,
    Series,
    VisadaptError,
    using,
)
from visadapt.backbone import tracing
from visadapt.runtime import door, host

SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")
TASKS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# one block or layer: compiling takes as long as there are blocks, and one has hosts of all kinds
def resnet(block=BasicBlock, **options):
    torch.manual_seed(0)
    model = ResNet(block, (1, 1, 1, 1), num_classes=10, channels=(16, 16, 16, 16), **options)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    return enliven(model).eval()


def vit():
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=7
    )
    return enliven(net).eval()


BACKBONES = {
    "resnet": resnet,
    "resnext": lambda: resnet(ResNetBottleneck, cardinality=4, base_width=32),
    "vit": vit,
    "bert": lambda: short(text=True),
}


def inputs_of(name, n):
    return ZOO["transformers/bert" if name == "bert" else "tiny/resnet"].inputs(n=n)


def injected(name, method, **options):
    model = BACKBONES[name]()
    for seed, task in enumerate(TASKS):
        visadapt.inject(model, method, task=task, num_classes=3 + 2 * seed, **options)
        stir(model, task, seed)
    return model.eval()


@ONE_GRAPH
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("resnet", Bottleneck(m=2), {}),
        ("resnet", Ladder(m=2), {}),
        ("resnet", Parallel(), {"norms": "frozen"}),
        ("resnet", Parallel(rank=2), {"norms": "frozen"}),
        ("resnet", Series(), {"norms": "frozen"}),
        ("resnet", Mona(m=2), {"norms": "frozen"}),
        ("resnet", LoRA(r=2, alpha=4), {"norms": "frozen"}),
        ("resnet", DoRA(r=2), {"norms": "frozen"}),
        ("resnet", DAN(), {"norms": "frozen"}),
        ("resnet", TSA(align=True), {"norms": "frozen"}),
        *[("resnet", ConvAdapter(scheme=scheme), {"norms": "frozen"}) for scheme in SCHEMES],
        ("resnext", LoRA(r=2), {"norms": "frozen"}),
        ("bert", Bottleneck(m=2), {}),
        ("bert", SSF(), {"norms": "frozen"}),
        ("bert", LoRA(r=2), {"norms": "frozen"}),
        ("bert", DoRA(r=2), {"norms": "frozen"}),
        ("bert", Parallel(rank=2), {"where": "query", "norms": "frozen"}),
        ("bert", AdaptFormer(m=2), {"norms": "frozen"}),
        ("vit", AdaptFormer(m=2), {"norms": "frozen"}),
        ("vit", LoRA(r=2), {}),
    ],
    ids=str,
)
def test_all_compositions_run_one_graph(name, method, options) -> None:
    model, inputs = injected(name, method, **options), inputs_of(name, 5)
    counter, draw = CompileCounter(), random.Random(0)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        with using(model, [None, *TASKS]):
            output(model, inputs)  # shows which rows belong to which sample
        for _ in range(12):
            tasks = draw.choices([*TASKS, None], k=5)
            with using(model, tasks):
                expected = output(model, inputs)
                found = output(compiled, inputs)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", [Series(norm=False), Parallel(), Bottleneck(m=16, depthwise=True)], ids=str)
def test_few_tasks_with_large_matrices_are_each_alone(method) -> None:
    model, x = injected("resnet", method, norms="frozen"), inputs_of("resnet", 8)["x"][..., :32, :32]
    tasks = ["a", "b", "b", "a", "b", "a", "a", "b"]
    with torch.no_grad():
        with using(model, tasks):
            found = model(x)
        for i, task in enumerate(tasks):
            with using(model, task):
                alone = model(x[i : i + 1])
            torch.testing.assert_close(found[i : i + 1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


@ONE_GRAPH
def test_a_graph_sees_changed_values_and_new_tasks_and_refuses_removed_ones() -> None:
    model, inputs = injected("resnet", Bottleneck(m=2)), inputs_of("resnet", 3)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for change in ("nothing", "values", "task"):
            names = ["a", "b", "a"]
            if change == "values":
                for p in visadapt.parameters(model, "a"):
                    p.data.add_(0.1)
            if change == "task":
                visadapt.inject(model, Bottleneck(m=2), task="e", num_classes=3)
                stir(model.eval(), "e", 9)
                names = ["a", "e", "e"]
            with using(model, names):
                expected = output(model, inputs)
                torch.testing.assert_close(output(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
        with using(model, ["a", "e", "b"]):
            visadapt.remove(model, "e")
            with pytest.raises(VisadaptError, match="removed"):
                output(compiled, inputs)


def test_tasks_of_several_methods_compile_once_per_composition() -> None:
    model, inputs = injected("resnet", Bottleneck(m=2)), inputs_of("resnet", 2)
    visadapt.inject(model, LoRA(r=2), task="e", num_classes=3)
    stir(model.eval(), "e", 9)
    compiled = compiled_whole(model, backend="eager")
    with torch.no_grad():
        for names in (["a", "e"], ["e", "a"], ["b", "a"]):
            with using(model, names):
                expected = output(model, inputs)
                torch.testing.assert_close(output(compiled, inputs), expected, rtol=1e-4, atol=1e-5)


def test_modes_that_change_after_the_tasks_were_chosen(image) -> None:
    model = injected("resnet", Bottleneck(m=2, dropout=0.5))
    compiled = compiled_whole(model, backend="eager")
    with torch.no_grad(), using(model, ["a", "b"]):
        assert torch.equal(model(image), model(image))
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
        model.train()
        assert not torch.equal(compiled(image), compiled(image))
        model.eval()
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


def test_the_number_of_a_task_is_never_given_again() -> None:
    model = injected("resnet", Bottleneck(m=2))
    used = {task.number for task in visadapt.tasks(model).values()}
    visadapt.remove(model, "d")
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        visadapt.inject(copied, m=2, task="e", num_classes=3)
        assert visadapt.tasks(copied)["e"].number not in used


def test_a_model_runs_uncompiled_where_a_graph_cannot_read_the_tasks(monkeypatch) -> None:
    """As in all versions of torch before 2.14."""
    monkeypatch.setattr(tracing, "READS_CONTEXT", False)
    for module in (door, host):
        uncompiled = torch.compiler.disable(tracing.run_uncompiled_before_torch_2_14)
        monkeypatch.setattr(module, "run_uncompiled_before_torch_2_14", uncompiled)
    model, inputs = injected("resnet", Bottleneck(m=2)), inputs_of("resnet", 3)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for tasks in (["a", "b", "a"], [None, "d", "c"], "a", None, "b"):
        with using(model, tasks):
            assert torch.equal(output(compiled, inputs), output(model, inputs))
    assert counter.frame_count == 0

    def outputs():
        with using(model, "a"):
            while True:
                yield output(compiled, inputs)

    found = next(outputs())
    with using(model, "a"):
        assert torch.equal(found, output(model, inputs))
    torch._dynamo.reset()  # it skips what it skipped before
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run_uncompiled_before_torch_2_14"):
        output(torch.compile(model, backend=counter, fullgraph=True), inputs)


@ONE_GRAPH
def test_a_compiled_model_in_generators_is_refused_and_in_threads_is_right() -> None:
    model, x = injected("resnet", Bottleneck(m=2), norms="frozen"), inputs_of("resnet", 2)["x"]
    compiled = compiled_whole(model, backend="eager")
    expected, wrong = {}, []
    for task in ("a", "b"):
        with torch.no_grad(), using(model, task):
            expected[task] = model(x)

    def outputs(task):
        with using(model, task):
            while True:
                yield compiled(x)

    def check(task):
        with torch.no_grad(), using(model, task):
            wrong.extend(task for _ in range(10) if not torch.allclose(compiled(x), expected[task], atol=1e-5))

    for known in (False, True):  # before and after there is a graph of each task
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="which of several generators"):
            next(outputs("a"))
        threads = [threading.Thread(target=check, args=(task,)) for task in ("a", "b", "a")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, known
