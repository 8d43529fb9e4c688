"""What is changed in a model after its first mixed batch: flags, lists, options, children, buffers, classes."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import visadapt
from tests.models import answer, stir
from visadapt import Bottleneck, LoRA, VisadaptError, using
from visadapt.backbone.tracing import READS_CONTEXT
from visadapt.runtime.registry import registry_of


class Turn(nn.Module):
    """Turns the batch around, or does nothing."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0) if self.on else x


TURNED, SETTINGS = False, {"turned": False}
"""Variables of this file that a forward reads, in a method and in a function that it calls."""

imported = types.ModuleType("imported")
imported.turned = False  # type: ignore[attr-defined]


def set_to_turn() -> bool:
    return SETTINGS["turned"] or imported.turned


class Options:
    turned = False


class Net(nn.Module):
    """Turns its batch around between layers, there and back, if any of its attributes says so."""

    turns = False

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.before, self.after = Turn(False), Turn(False)
        self.flag, self.mode, self.order, self.names = False, "plain", [1], {"turned": False}
        self.options, self.nested, self.index = Options(), {"a": [types.SimpleNamespace(turned=False)]}, torch.arange(5)
        self.register_buffer("flagged", torch.tensor(False))
        self.register_buffer("share", torch.tensor(0.0))
        self.steps: Any = []

    def way(self, x: Tensor) -> Tensor:
        return x

    def turned(self) -> bool:
        return (
            self.flag
            or self.mode == "turned"
            or self.order[0] == -1
            or self.names["turned"]
            or self.options.turned
            or self.nested["a"][0].turned
            or self.turns
            or bool(self.index[0])
            or bool(self.flagged)
            or float(self.share) > 0.5
            or TURNED
            or set_to_turn()
            or getattr(self, "added", False)
            or len(self.steps) > 0
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x))
        turned = self.turned()
        x = self.way(x.flip(0) if turned else x)
        x = self.way(x + self.norm(self.block(x)))
        return self.fc(self.after(x.flip(0) if turned else x))


def turn_modules(model: Net) -> None:
    model.before.on = model.after.on = True


def replace_modules(model: Net) -> None:
    model.before, model.after = Turn(True), Turn(True)


def insert_modules(model: Net) -> None:
    model.before, model.after = nn.Sequential(Turn(True)), nn.Sequential(Turn(False), Turn(True))


def give_method(model: Net) -> None:
    model.way = lambda x: x.flip(0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a flag": lambda model: setattr(model, "flag", True),
    "a mode": lambda model: setattr(model, "mode", "turned"),
    "a list in place": lambda model: model.order.__setitem__(0, -1),
    "a list": lambda model: setattr(model, "order", [-1]),
    "a list that grows": lambda model: model.steps.append(1),
    "a dict in place": lambda model: model.names.update(turned=True),
    "an option": lambda model: setattr(model.options, "turned", True),
    "an option within": lambda model: setattr(model.nested["a"][0], "turned", True),
    "a tensor": lambda model: setattr(model, "index", torch.arange(1, 6)),
    "a buffer": lambda model: setattr(model, "flagged", torch.tensor(True)),
    "a buffer in place": lambda model: model.flagged.fill_(True),
    "a buffer of floats": lambda model: model.share.fill_(1.0),
    "a new attribute": lambda model: setattr(model, "added", True),
    "flags of modules": turn_modules,
    "other modules": replace_modules,
    "modules within": insert_modules,
    "a method": give_method,
}
BOTTLENECK = Bottleneck(m=2)


@pytest.fixture
def made():
    def make(model: nn.Module | None = None, method=BOTTLENECK, example: tuple[int, ...] = (2, 12)) -> Any:
        torch.manual_seed(0)
        model = (model or Net()).eval()
        for seed, task in enumerate("ab"):
            visadapt.inject(model, method, task=task, example=torch.randn(example), where="linear")
            stir(model, task, seed)
        return model

    return make


def check(model: nn.Module, tasks: str = "aabab", width: int = 12) -> None:
    """Check that each sample gets its own task's answer."""
    x = torch.randn(len(tasks), width)
    mixed = answer(model, {"x": x}, list(tasks))
    for task in set(tasks):
        rows = [i for i, each in enumerate(tasks) if each == task]
        torch.testing.assert_close(mixed[rows], answer(model, {"x": x}, task)[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("method", [Bottleneck(m=2), LoRA(r=2)], ids=str)
def test_what_is_changed_after_the_first_batch(made, change, method) -> None:
    model = made(method=method)
    check(model)
    change(model)
    check(model)
    check(model, "aab")


def test_classes_that_are_changed(made, monkeypatch) -> None:
    model = made()
    check(model)
    monkeypatch.setattr(Net, "turns", True)
    check(model)
    monkeypatch.setattr(Net, "turns", False)
    check(model)
    monkeypatch.setattr(Net, "way", lambda self, x: x.flip(0))
    check(model)


def test_variables_of_a_file_that_are_changed(made, monkeypatch) -> None:
    model = made()
    check(model)
    monkeypatch.setitem(globals(), "TURNED", True)
    check(model)
    monkeypatch.setitem(globals(), "TURNED", False)
    check(model)
    monkeypatch.setitem(SETTINGS, "turned", True)
    check(model)
    monkeypatch.setitem(SETTINGS, "turned", False)
    check(model)
    monkeypatch.setattr(imported, "turned", True)
    check(model)


class Flagged(nn.Module):
    """Turns its batch around between layers, there and back, if its flag says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc, self.flag = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flip(0) if self.flag else self.stem(x)
        x = x + self.block(x)
        return self.fc(x.flip(0) if self.flag else x)


def test_a_graph_is_not_made_with_the_facts_of_another_state(made) -> None:
    model, tasks, x = made(Flagged(), LoRA(r=2)), list("aabab"), torch.randn(5, 12)
    check(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), using(model, tasks):
        torch.testing.assert_close(compiled(x), answer(model, {"x": x}, tasks))
        model.flag = True
        if READS_CONTEXT:
            with pytest.raises(VisadaptError, match=r"was changed since its last batch.*run one again"):
                compiled(x)
        model.flag = False
        check(model)
        torch.testing.assert_close(compiled(x), answer(model, {"x": x}, tasks))


@pytest.mark.skipif(not READS_CONTEXT, reason="before torch 2.14 modules with adapters run uncompiled")
def test_a_graph_of_a_copy_is_made_with_the_facts_of_its_model_while_these_are_current(made) -> None:
    model, tasks, x = made(Flagged(), LoRA(r=2)), list("aabab"), torch.randn(5, 12)
    check(model)
    with torch.no_grad():
        current = copy.deepcopy(model)
        model.flag = True
        changed = copy.deepcopy(model)
        with using(current, tasks):
            found = torch.compile(current, backend="eager")(x)
        torch.testing.assert_close(found, answer(current, {"x": x}, tasks))
        with using(changed, tasks), pytest.raises(VisadaptError, match="was changed since its last batch"):
            torch.compile(changed, backend="eager")(x)


def test_an_export_changes_no_state() -> None:
    # torch.export sets attributes anew, each by a copy of its own
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    for task in "ab":
        visadapt.inject(model, Bottleneck(m=2), task=task)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), using(model, ["a", "b"]):
        expected = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)
        assert registry_of(model).facts.are_current()


def test_states_that_return_are_known(made, examined) -> None:
    model = made()
    for flag in (False, True, False, True):
        model.flag = flag
        check(model)
    assert examined == [5, 5]
    model.mode = "".join(["pl", "ain"])
    model.order, model.names = [1], {"turned": False}
    check(model)
    assert examined == [5, 5]


class First(nn.Module):
    """A recurrent layer whose samples lie along the axis that its flag says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.batch_first = nn.Linear(12, 16), nn.Linear(16, 4), True
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.fc(x.mean(1 if self.batch_first else 0))


def test_an_axis_that_a_flag_moves(made) -> None:
    model = made(First(), example=(2, 4, 12))
    for first in (True, False, True):
        model.batch_first = first
        x = torch.randn(4, 4, 12)
        mixed = answer(model, {"x": x}, list("abba"))
        for i, task in enumerate("abba"):
            alone = answer(model, {"x": x[i : i + 1] if first else x[:, i : i + 1]}, task)
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


class Keeping(Net):
    """Sets attributes in each forward."""

    def __init__(self, keep: Callable[[Any, Tensor], Any], turned: Callable[[Any], bool]) -> None:
        super().__init__()
        self.keep, self.turn = keep, turned
        self.calls, self.last, self.saved = 0, 0, None

    def turned(self) -> bool:
        return self.turn(self)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.keep(self, x)
        return out


def count(model: Any, x: Tensor) -> None:
    model.calls += 1


def size(model: Any, x: Tensor) -> None:
    model.last = (len(x), x.shape[1])


def save(model: Any, x: Tensor) -> None:
    model.saved = x


KEPT = {
    "a counter": (count, lambda model: model.calls % 5 == 4),
    "a long counter": (count, lambda model: model.calls > 6),
    "the last size": (size, lambda model: model.last != 0 and model.last[0] == 4),
    "a first call": (count, lambda model: model.calls == 0),
    "the last batch": (save, lambda model: model.saved is not None and len(model.saved) == 3),
}


@pytest.mark.parametrize(("keep", "turned"), KEPT.values(), ids=KEPT)
def test_orders_that_depend_on_earlier_calls(made, keep, turned) -> None:
    model = made(Keeping(keep, turned))
    for tasks in ("aabab", "aab", "abba", "aabab", "abab", "aabab", "abb", "aabab"):
        check(model, tasks)


@pytest.mark.parametrize("keep", [size, save])
def test_what_each_forward_sets_anew_is_not_examined_again(made, examined, keep) -> None:
    model = made(Keeping(keep, lambda model: False))
    for tasks in ("aabab", "aab", "aabab", "aab", "aabab"):
        check(model, tasks)
    assert examined == [5, 3]


def test_tasks_that_come_and_go_change_nothing(made, examined) -> None:
    model = made()
    check(model)
    visadapt.inject(model, LoRA(r=2), task="c", where="linear", example=torch.randn(2, 12))
    stir(model, "c", 5)
    check(model, "abcab")
    visadapt.remove(model, "c")
    model.block.register_forward_hook(lambda module, args, out: None)
    check(model)
    assert examined == [5]


def test_a_flag_that_is_changed_in_a_copy(made) -> None:
    model = made()
    check(model)
    other = copy.deepcopy(model)
    other.flag = True
    check(other)
    check(model)


class Steered(Net):
    """Turns its batch around if its argument says so, or a number that it reads from its batch or a weight."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("places", torch.arange(32.0))
        self.gate = nn.Parameter(-torch.ones(40))

    def forward(self, x: Tensor, time: Any = 0.0) -> Tensor:
        order = torch.arange(len(x))
        if self.by == "places":
            order = self.places[: len(x)].argsort()
        elif self.by == "gate places":
            order = self.gate[: len(x)].argsort(stable=True)
        elif self.by == "gate":
            order = order.flip(0) if self.gate.sum() > 0 else order
        elif float(time) > 0.5 if self.by == "time" else x.mean() > 0:
            order = order.flip(0)
        return super().forward(x[order])[order.argsort()]


@pytest.mark.parametrize("time", [float, torch.tensor], ids=["a number", "a tensor"])
def test_an_order_that_an_argument_steers(made, time) -> None:
    model, x = made(Steered("time")), torch.randn(5, 12)
    for step in (*range(34), 90):
        now = time(step / 100)
        with torch.no_grad(), using(model, list("aabab")):
            mixed = model(x, now)
    for task in "ab":
        with using(model, task):
            alone = model(x, now)
        rows = [i for i, each in enumerate("aabab") if each == task]
        torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-4, atol=1e-5)


def test_an_order_that_a_batch_steers_as_a_whole(made) -> None:
    model = made(Steered("mean"))
    for shift in (-3.0, 3.0, -3.0):
        x = torch.randn(5, 12) + shift
        mixed = answer(model, {"x": x}, list("aabab"))
        for task in "ab":
            rows = [i for i, each in enumerate("aabab") if each == task]
            alone = answer(model, {"x": x[rows]}, task)
            torch.testing.assert_close(mixed[rows], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("by", "change"),
    [
        ("places", lambda model: model.places.copy_(model.places.flip(0))),
        ("places", lambda model: model.places.data.copy_(model.places.flip(0))),
        ("places", lambda model: setattr(model, "places", model.places.flip(0))),
        ("gate places", lambda model: model.gate.data.copy_(-torch.arange(40.0))),
        ("gate", lambda model: model.gate.data.fill_(1.0)),
    ],
)
def test_an_order_that_many_numbers_of_the_model_steer(made, by, change) -> None:
    model = made(Steered(by))
    check(model)
    change(model)
    check(model)
