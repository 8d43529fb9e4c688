"""What takes part in a forward beside the model's own code: hooks that replace tensors, and forwards given later."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy
import pytest
import torch
from torch import nn

import visadapt
from tests.models import answer, stir
from visadapt import Bottleneck, LoRA, VisadaptError, using

TASKS = list("aabab")
BOTTLENECK = Bottleneck(m=3)


class Net(nn.Module):
    """Three layers, between which ``orders`` of the samples may come and go."""

    def __init__(self, order=None) -> None:
        super().__init__()
        self.generator = numpy.random.default_rng(0)
        self.stem, self.fc, self.order = nn.Linear(12, 16), nn.Linear(16, 4), order
        self.first, self.block = nn.Identity(), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.norm, self.last = nn.LayerNorm(16), nn.Identity()

    def forward(self, x):
        x = self.first(self.stem(x))
        order = self.generator.permutation if self.order == "own" else self.order or torch.arange
        index = torch.as_tensor(order(len(x)))
        x = x[index]
        return self.fc(self.last((x + self.norm(self.block(x)))[index.argsort()]))


@pytest.fixture
def made():
    def make(order=None, method=BOTTLENECK):
        torch.manual_seed(0)
        model = Net(order).eval()
        for seed, task in enumerate("ab"):
            visadapt.inject(model, method, task=task, example=torch.randn(2, 12), where="linear")
            stir(model, task, seed)
        return model

    return make


def check(model, tasks=TASKS):
    torch.manual_seed(1)
    x = torch.randn(len(tasks), 12)
    with torch.no_grad(), using(model, tasks):
        mixed = model(x)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(mixed[row : row + 1], answer(model, {"x": x[row : row + 1]}, task))


def even(n):
    return torch.arange(n).view(2, -1).T.flatten() if n % 2 == 0 else torch.arange(n)


def large(n):
    return torch.arange(n).flip(0) if n > 3 else torch.arange(n)


def pythons(n):
    return random.sample(range(n), n)


def numpys(n):
    return numpy.random.permutation(n)


@pytest.mark.parametrize("order", [torch.randperm, numpys, pythons, "own", even, large])
@pytest.mark.parametrize("method", [Bottleneck(m=3), LoRA(r=2)], ids=str)
def test_orders_that_change_with_each_call_or_with_the_number_of_samples(made, order, method) -> None:
    model = made(order, method)
    for tasks in ("aab", "aabb", "aab", "aabab", "aabb", "ababaa"):
        check(model, list(tasks))


def lengths(model, each=range(5, 10), sizes=(3, 4, 6)):
    for length in each:
        for n in sizes:
            x, tasks = torch.randn(n, length, 12), ["a", "b", *"a" * (n - 2)]
            torch.testing.assert_close(answer(model, {"x": x}, tasks)[1:2], answer(model, {"x": x[1:2]}, "b"))


def test_a_known_number_of_samples_is_not_examined_again(made, examined) -> None:
    model = made()
    for tasks in ("aab", "aba", "aabb", "abbb", "aab", "ab"):
        check(model, list(tasks))
    assert examined == [3, 4, 2]


def test_a_server_keeps_facts_of_a_bounded_number_of_batches(made, monkeypatch) -> None:
    monkeypatch.setattr("visadapt.backbone.known_batches._MOST", 2)
    model = made(large)
    lengths(model)
    known = vars(visadapt.runtime.registry.registry_of(model).facts.batches)
    assert all(len(known[name]) <= 2 for name in ("_exact", "_patterns", "_tries", "_single", "_shared"))


HOOKS = {
    "shifted": (lambda m, a, out: out.roll(1, 0), lambda m, a, out: out.roll(-1, 0)),
    "two views": (lambda m, a, out: torch.cat([out, out + 1]), lambda m, a, out: sum(out.chunk(2))),
    "larger": (lambda m, a, out: out * 2, lambda m, a, out: out + 1),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_replace_outputs(made, kind, late) -> None:
    model = made()
    if late:
        check(model)
    handles = [m.register_forward_hook(h) for m, h in zip((model.first, model.last), HOOKS[kind], strict=True)]
    check(model)
    check(model)
    for handle in handles:
        handle.remove()
    check(model)


def test_hooks_that_replace_inputs(made) -> None:
    model = made()
    model.first.register_forward_pre_hook(lambda m, a, k: ((a[0].flip(0),), k), with_kwargs=True)
    model.last.register_forward_pre_hook(lambda m, a: a[0].flip(0))
    check(model)
    check(model, list("aab"))


def test_a_training_step_with_hooks_that_move_rows_is_refused_once(made) -> None:
    model, x = made().train(), torch.randn(5, 12)
    for module, hook in zip((model.first, model.last), HOOKS["larger"], strict=True):
        module.register_forward_hook(hook)
    with using(model, TASKS):
        model(x)
    first, last = (lambda m, a, out: out.flip(0)), (lambda m, a, out: out.flip(0))
    model.first.register_forward_hook(first)
    model.last.register_forward_hook(last)
    with using(model, TASKS):
        with pytest.raises(VisadaptError, match=r"hook .*moves the rows of samples.*call it again"):
            model(x)
        model(x)
    check(model)


def test_hooks_that_only_look_are_called_once_and_stay_what_they_are(made) -> None:
    model, seen = made(), Counter()

    def look(module, args, out):
        seen[type(module).__name__] += 1
        return out

    model.norm.register_forward_hook(look)
    model.first.register_forward_pre_hook(lambda module, args: seen.update(["before"]))
    kept = [dict(m._forward_hooks) for m in model.modules()]
    x = torch.randn(5, 12)

    def run():
        for _ in range(4):
            with torch.no_grad(), using(model, TASKS):
                model(x)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"LayerNorm": 12, "before": 12}
    assert [dict(m._forward_hooks) for m in model.modules()] == kept


def test_a_forward_given_after_the_first_batch(made) -> None:
    model = made(method=LoRA(r=2))
    check(model)
    plain = type(model.norm).forward
    # a non-host around which rows are moved, there and back
    model.first.forward = lambda x: x.flip(0)
    model.last.forward = lambda x: x.flip(0)
    check(model)
    del model.first.forward, model.last.forward
    check(model)
    assert type(model.norm).forward is plain


def test_batches_without_values_are_refused_with_the_reason(made) -> None:
    model, x = made(), torch.randn(2, 5, 12)
    refused = pytest.raises(VisadaptError, match=r"meta device or inside torch.vmap .* one task at a time")
    with refused, using(model, TASKS):
        torch.vmap(model)(x)
