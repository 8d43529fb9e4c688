"""Orders of samples that depend on sizes: on the number of samples, on images' sides, on texts' lengths, on both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.models import answer, stir
from visadapt import Bottleneck, LoRA


class Net(nn.Module):
    """Layers on tokens or pixels, between which samples have an order that depends on the batch's shape."""

    def __init__(self, order: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        index = self.order(*x.shape[:2])
        x = x[index]
        return self.fc((x + self.norm(self.block(x)))[index.argsort()].mean(1))


class Chunked(nn.Module):
    """Runs its middle layers on parts of a large batch, one after the other."""

    def __init__(self, parts: Callable[[int, int], int]) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(12, 16), nn.Linear(16, 4)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([part + self.block(part) for part in x.chunk(self.parts(*x.shape[:2]))]).mean(1))


class Axes(nn.Module):
    """Works with the samples along the second axis, for shapes of a certain kind."""

    def __init__(self, second: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.stem, self.fc, self.second = nn.Linear(12, 16), nn.Linear(16, 4), second
        self.block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        second = self.second(*x.shape[:2])
        x = self.stem(x)
        x = x.transpose(0, 1) if second else x
        x = x + self.block(x)
        return self.fc((x.transpose(0, 1) if second else x).mean(1))


def flipped(when: Callable[[int, int], bool]) -> Callable[[int, int], Tensor]:
    return lambda n, length: torch.arange(n).flip(0) if when(n, length) else torch.arange(n)


def rolled(by: Callable[[int, int], int]) -> Callable[[int, int], Tensor]:
    return lambda n, length: torch.arange(n).roll(by(n, length))


def interleaved(n: int, length: int) -> Tensor:
    return torch.arange(n).view(3, -1).T.flatten() if n % 3 == 0 else torch.arange(n)


ORDERS = {
    "a third": flipped(lambda n, length: n % 3 == 0),
    "not a third": flipped(lambda n, length: n % 3 != 0),
    "three rows": interleaved,
    "remainder of 4": rolled(lambda n, length: n % 4),
    "remainder of 5": flipped(lambda n, length: n % 5 == 1),
    "above 7": flipped(lambda n, length: n > 7),
    "below 7": flipped(lambda n, length: n < 7),
    "five only": flipped(lambda n, length: n == 5),
    "powers of two": flipped(lambda n, length: n & (n - 1) == 0),
    "no powers of two": flipped(lambda n, length: n & (n - 1) != 0),
    "between": flipped(lambda n, length: 3 < n < 6),
    "long": flipped(lambda n, length: length > 64),
    "short": flipped(lambda n, length: length < 12),
    "one length": flipped(lambda n, length: length == 33),
    "odd length": flipped(lambda n, length: length % 2 == 1),
    "shift by length": rolled(lambda n, length: length // 16),
    "tokens in all": flipped(lambda n, length: n * length > 200),
    "both": flipped(lambda n, length: n > 4 and length > 30),
    "sum": flipped(lambda n, length: (n + length) % 3 == 0),
    "more samples than tokens": flipped(lambda n, length: n > length),
}
CHUNKS = {
    "long": lambda n, length: 1 + (length > 30),
    "large": lambda n, length: 1 + (n > 4),
    "tokens in all": lambda n, length: 1 + n * length // 100,
}
SECOND = {
    "long": lambda n, length: length > 30,
    "more samples than tokens": lambda n, length: n > length,
    "a third": lambda n, length: n % 3 == 0,
}
SHAPES = [(3, 8), (4, 8), (5, 8), (8, 8), (7, 16), (4, 33), (3, 65), (5, 65), (9, 20), (6, 33), (2, 90), (4, 2)]

BOTTLENECK = Bottleneck(m=3)


@pytest.fixture
def made():
    def make(model: nn.Module, method=BOTTLENECK) -> nn.Module:
        torch.manual_seed(0)
        for seed, task in enumerate("ab"):
            visadapt.inject(model.eval(), method, task=task, example=torch.randn(2, 5, 12), where="linear")
            stir(model, task, seed)
        return model

    return make


def check(model: nn.Module, shapes=SHAPES) -> None:
    """Check that each sample gets its own task's answer."""
    for n, length in shapes:
        x, tasks = torch.randn(n, length, 12), ["ab"[i % 3 == 1] for i in range(n)]
        mixed = answer(model, {"x": x}, tasks)
        for task in "ab":
            rows = [i for i in range(n) if tasks[i] == task]
            alone = answer(model, {"x": x}, task)[rows]
            torch.testing.assert_close(mixed[rows], alone, rtol=1e-4, atol=1e-5, msg=f"{n} samples of {length}")


# which rows belong to which sample is a fact of the backbone, whatever the method is
@pytest.mark.parametrize(
    ("order", "method"),
    [(order, (BOTTLENECK, LoRA(r=2))[i % 2]) for i, order in enumerate(ORDERS.values())],
    ids=ORDERS,
)
def test_orders_that_depend_on_sizes(made, order, method) -> None:
    check(made(Net(order), method))


@pytest.mark.parametrize("places", [(2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)], ids=str)
def test_all_orders_of_three(made, places) -> None:
    model = made(Net(lambda n, length: torch.tensor(places) if n == 3 else torch.arange(n)))
    x = torch.randn(4, 8, 12)
    for tasks in ("abab", "aab", "aba", "abb"):
        mixed = answer(model, {"x": x[: len(tasks)]}, list(tasks))
        for i, task in enumerate(tasks):
            torch.testing.assert_close(mixed[i], answer(model, {"x": x}, task)[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", CHUNKS.values(), ids=CHUNKS)
def test_batches_that_run_in_parts(made, parts) -> None:
    check(made(Chunked(parts)))


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_axes_that_depend_on_sizes(made, second) -> None:
    check(made(Axes(second)))


class Content(Net):
    """Sorts its samples by what is in them."""

    def __init__(self, least: int) -> None:
        super().__init__(lambda n, length: torch.arange(n))
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        index = x.mean((1, 2)).argsort() if x.shape[1] > self.least else torch.arange(len(x))
        x = self.stem(x)[index]
        return self.fc((x + self.norm(self.block(x)))[index.argsort()].mean(1))


@pytest.mark.parametrize("least", [0, 30, 64])
def test_orders_by_content(made, least) -> None:
    check(made(Content(least)))


@pytest.fixture
def examined(monkeypatch):
    """The number of samples and of compared ones of each examination."""
    found, examine = [], visadapt.backbone.known_batches.examine
    monkeypatch.setattr(
        "visadapt.backbone.known_batches.examine",
        lambda *args: (found.append((args[2], *args[5:])), examine(*args))[1],
    )
    return found


def run(model: nn.Module, n: int, length: int) -> None:
    answer(model, {"x": torch.randn(n, length, 12)}, ["a", "b"] + ["a"] * (n - 2))


class Turning(Net):
    """Turns its batch around for sizes that pass a test."""

    def __init__(self, test: Callable[[int, int], bool]) -> None:
        super().__init__(lambda n, length: torch.arange(n))
        self.test = test

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        turned = self.test(*x.shape[:2])
        x = x.flip(0) if turned else x
        x = x + self.norm(self.block(x))
        return self.fc((x.flip(0) if turned else x).mean(1))


TESTS = {
    "a third": lambda n, length: n % 3 == 0,
    "above 7": lambda n, length: n > 7,
    "long": lambda n, length: length > 64,
    "tokens in all": lambda n, length: n * length > 200,
    "sum": lambda n, length: (n + length) % 3 == 0,
    "powers of two": lambda n, length: n & (n - 1) == 0,
    "a list": lambda n, length: n in (4, 9),
}


@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
def test_tests_of_sizes(made, test) -> None:
    check(made(Turning(test)))


def test_sizes_with_the_same_tests_are_not_examined_again(made, examined) -> None:
    model = made(Turning(lambda n, length: n % 3 == 0 or length > 64))
    for n, length in [(4, 8), (5, 9)]:
        run(model, n, length)
    assert examined == [(4,), (5,)]
    check(model, [(7, 9), (8, 64), (2, 20), (11, 10)])
    assert examined == [(4,), (5,)]
    check(model, [(3, 8), (6, 8), (9, 30), (5, 65), (7, 80)])
    assert examined == [(4,), (5,), (3,), (5,)]


class Moved(Turning):
    """Moves its samples by an amount that depends on sizes, without a test."""

    def __init__(self, amount: Callable[[int, int], int]) -> None:
        super().__init__(lambda n, length: False)
        self.amount = amount

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        amount = self.amount(*x.shape[:2])
        x = torch.cat([x[amount:], x[:amount]])
        x = x + self.norm(self.block(x))
        return self.fc(x.roll(amount, 0).mean(1))


MOVES = {
    "remainder": lambda n, length: n % 4,
    "part": lambda n, length: n // 6,
    "length": lambda n, length: length // 16,
}


@pytest.mark.parametrize("amount", MOVES.values(), ids=MOVES)
def test_amounts_that_depend_on_sizes(made, amount) -> None:
    check(made(Moved(amount)), [(4, 8), (8, 8), (8, 9), (5, 8), (3, 9), (9, 20), (7, 33), (8, 40)])


@pytest.mark.parametrize("order", [ORDERS["tokens in all"], ORDERS["long"]], ids=["tokens in all", "long"])
@pytest.mark.parametrize("exact", [0, 3])
def test_orders_are_found_after_many_sizes_too(made, order, exact, monkeypatch) -> None:
    monkeypatch.setattr("visadapt.backbone.known_batches._EXACT", exact)
    check(made(Net(order)), SHAPES[:-1])


def test_the_number_of_examinations_is_bounded(made, examined, monkeypatch) -> None:
    monkeypatch.setattr("visadapt.backbone.known_batches._EXACT", 4)
    model = made(Net(ORDERS["five only"]))
    for n, length in [(8, 20), (3, 10), (4, 10), (3, 11), (4, 11)]:
        run(model, n, length)
    assert examined == [(8,), (3,), (4,), (3,)]
    examined.clear()
    run(model, 3, 12)
    # all samples of a new number, or of the largest batch; three of a new length
    assert examined == [(3, 3)]
    run(model, 4, 12)
    run(model, 6, 12)
    run(model, 6, 10)
    run(model, 8, 21)
    run(model, 4, 21)
    assert examined == [(3, 3), (6,), (8,)]


def test_a_model_with_several_orders_is_examined_at_each_size(made, examined, monkeypatch) -> None:
    monkeypatch.setattr("visadapt.backbone.known_batches._EXACT", 2)
    model = made(Net(ORDERS["five only"]))
    for n in (4, 5):
        for length in (12, 11, 10):
            run(model, n, length)
            run(model, n, length)
    assert examined == [(4,), (4,), (4, 3), (5,), (5,), (5,)]


def test_a_list_of_one_task_needs_no_examination_of_its_own(made, examined) -> None:
    model = made(Net(ORDERS["long"]))
    for n in (4, 5, 6):
        answer(model, {"x": torch.randn(n, 9, 12)}, ["a"] * n)
    assert examined == [(4,)]
