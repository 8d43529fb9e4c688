"""Every method on backbones of every build: in a mixed batch each sample gets what its task alone gives it.

Each build meets a third of the methods, another third than its neighbours. VISADAPT_MATRIX=full lets all meet all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visadapt
from tests.models import enliven, stir
from tests.runtime.builds import BUILDS, Build
from visadapt import (
    DAN,
    SSF,
    TSA,
    AdaptFormer,
    Biases,
    Bottleneck,
    CoLoRA,
    ConvAdapter,
    DoRA,
    Full,
    Ladder,
    Linear,
    LoRA,
    Mona,
    Norms,
    Parallel,
    Series,
    TopLayers,
    VisadaptError,
)
from visadapt.backbone.facts import Facts
from visadapt.methods.method import Method

METHODS = (
    Bottleneck(m=3),
    Parallel(),
    Series(norm=False),
    Series(),
    TSA(),
    DAN(),
    ConvAdapter(),
    ConvAdapter(scheme="residual-parallel"),
    SSF(),
    LoRA(r=2),
    CoLoRA(r=2),
    DoRA(r=2),
    Ladder(m=3),
    Mona(m=3, dropout=0.0),
    AdaptFormer(m=3),
    Linear(),
    Norms(),
    Biases(),
    TopLayers(1),
    Full(),
)
TASKS = ["b", "a", "c", "a", "b"]
"""An odd order; c is a task of another method, with norms or a head of its own where there can be any."""

TOLERANCE = 1e-5

FULL = os.environ.get("VISADAPT_MATRIX") == "full"

QUICK = ("encoder", "swin", "audio", "detector")
"""The builds of every run; the others are slow."""


@dataclass
class Tally:
    """Outcomes of all builds that one process ran."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def add(self, kind: str, build: Build, method: object, text: str) -> None:
        """Counts one outcome, and keeps a line of it unless it is right."""
        self.counts[kind] += 1
        if kind != "right":
            self.lines.append(f"  {kind}: {build.name} × {method}, {text[:150]}")


@pytest.fixture(scope="module")
def tally(request):
    found = Tally()
    yield found
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nmixed batches: {dict(found.counts)}", *found.lines, sep="\n")


@cache
def shared(name: str) -> nn.Module:
    """One backbone of a build, without what is random."""
    build = next(build for build in BUILDS if build.name == name)
    torch.manual_seed(0)
    model = enliven(build.make())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout", "attn_drop", "dropout_prob"):
            if isinstance(module.__dict__.get(key), float):
                module.__dict__[key] = 0.0
    return model.eval()


@cache
def place(name: str, method: Method) -> dict[str, Any]:
    """Where a method stands in a build, and with which policies: the first of these that it can have.

    Raises:
        VisadaptError: it can stand nowhere in this build.
    """
    model = shared(name)
    args, kwargs = next(build for build in BUILDS if build.name == name).batch(2)
    facts = Facts(model)
    norms = "frozen" if isinstance(method, Linear | Biases | Ladder) or not facts.norms else "affine"
    heads = ({"num_classes": 4}, {"num_classes": None}) if facts.head is not None else ({},)
    refusals = []
    for where in (None, "linear", "conv") if method.kinds else (None,):
        for head in heads:
            options = {"where": where, "norms": norms, "example": args or kwargs, **head}
            try:
                visadapt.inject(model, method, task="probe", **options)
            except VisadaptError as error:
                refusals.append(str(error))
                continue
            visadapt.remove(model, "probe")
            return options
    raise VisadaptError(refusals[0])


def put(build: Build, model: nn.Module, method: Method, task: str, seed: int) -> None:
    """Injects a task."""
    visadapt.inject(model, method, task=task, **place(build.name, method))
    stir(model, task, seed)


def run(model: nn.Module, given: Any, task: Any) -> Any:
    """One forward of a task, or of one per sample."""
    with visadapt.using(model, task):
        return model(*given[0], **given[1])


def differ(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    if len(found) != len(expected) or any(f.shape != e.shape for f, e in zip(found, expected, strict=True)):
        return float("inf")
    worst = [0.0]
    for f, e in zip(found, expected, strict=True):
        apart = torch.where(f == e, 0.0, (f - e).abs()).detach().nan_to_num(nan=float("inf"))
        scale = e.detach()[e.isfinite()].abs()
        worst += [float(apart.max() / scale.max().clamp_min(1e-3))] if scale.numel() else []
    return max(worst)


class Weighted:
    """A loss that weighs every number of every sample at random, alike in a mixed batch and alone."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], Tensor] = {}

    def __call__(self, samples: list[list[Tensor]], index: list[int]) -> Tensor:
        terms = []
        for row, tensors in zip(index, samples, strict=True):
            for number, tensor in enumerate(tensors):
                generator = torch.Generator().manual_seed(7 * row + number)
                weight = self.weights.setdefault((row, number), torch.randn(tensor.shape, generator=generator))
                terms.append((tensor * weight).sum())
        return torch.stack(terms).sum()


def outputs(build: Build, model: nn.Module, given: Any, together: bool) -> Iterator[tuple[list[int], list[Any]]]:
    """Numbers of samples and their outputs: all at once, or each task's alone."""
    if together:
        yield list(range(len(TASKS))), build.samples(run(model, given, TASKS), len(TASKS))
        return
    for task in dict.fromkeys(TASKS):
        index = [i for i, each in enumerate(TASKS) if each == task]
        yield index, build.samples(run(model, build.part(given, index), task), len(index))


def compare(build: Build, model: nn.Module, training: bool) -> float:
    """How much a mixed batch differs from each task alone: outputs, and in train mode gradients."""
    given = build.batch(len(TASKS))
    model.train(training)
    samples, grads = [], []
    loss = Weighted()
    trained = [p for task in "abc" for p in visadapt.parameters(model, task)]
    for together in (True, False):
        for p in trained:
            p.grad = None
        found: dict[int, list[Tensor]] = {}
        with torch.set_grad_enabled(training):
            for index, each in outputs(build, model, given, together):
                found |= zip(index, each, strict=True)
                if training:
                    loss(each, index).backward()
        samples.append([found[i] for i in range(len(TASKS))])
        grads.append([p.grad for p in trained])
    assert all(samples[0])
    worst = max(differ(mixed, alone) for mixed, alone in zip(*samples, strict=True))
    if not training:
        # the tasks are three, or there would be nothing to find
        other = dict(zip(range(5), build.samples(run(model, given, "a"), 5), strict=True))
        assert differ(other[0], samples[0][0]) > 1e-3
        assert differ(other[2], samples[0][2]) > 1e-3
        return worst
    pairs = [(m, a) for m, a in zip(*grads, strict=True) if m is not None or a is not None]
    assert pairs
    if any(m is None or a is None for m, a in pairs):
        return float("inf")
    scale = max(float(a.abs().max()) for _, a in pairs)
    return max(worst, *(float((m - a).abs().nan_to_num(nan=float("inf")).max()) / scale / 5 for m, a in pairs))


def outcome(build: Build, model: nn.Module, method: Method) -> Iterator[tuple[str, str]]:
    """What becomes of one method on one build."""
    try:
        put(build, model, method, "a", 1)
        put(build, model, method, "b", 2)
        put(build, model, Bottleneck(m=2, activation="relu"), "c", 3)
        with torch.no_grad():
            # a ladder cannot pool tokens whose map is not known, which shows when it runs
            run(model, build.batch(2), "a")
    except VisadaptError as error:
        yield "not for this build", str(error)
        return
    for training in (False, True)[: 1 + build.trains]:
        yield judged(build, model, training)


def judged(build: Build, model: nn.Module, training: bool) -> tuple[str, str]:
    """Whether the three tasks of a model are right in a mixed batch, and what is to be said about it."""
    try:
        apart = compare(build, model, training)
    except VisadaptError as error:
        return "refused", str(error)
    return "right" if apart <= TOLERANCE else "wrong", f"train={training}: {apart:.1e}"


@pytest.mark.filterwarnings("ignore:.*more than the .* of what it adapts")
@pytest.mark.parametrize(
    ("number", "build"),
    [pytest.param(i, b, id=b.name, marks=() if b.name in QUICK else pytest.mark.slow) for i, b in enumerate(BUILDS)],
)
def test_each_sample_of_a_mixed_batch_gets_what_its_task_alone_gives(number, build, tally):
    model = shared(build.name)
    counts: Counter[str] = Counter()
    for method in METHODS if FULL else METHODS[number % 3 :: 3]:
        for kind, text in outcome(build, model, method):
            counts[kind] += 1
            tally.add(kind, build, method, text)
        for task in list(visadapt.tasks(model)):
            visadapt.remove(model, task)
    assert counts["wrong"] == 0, tally.lines
    assert counts["refused"] <= 0.05 * counts["right"], tally.lines
    # a decoder of texts without a head: the kernels with neighbours, what needs a map, and what trains a head alone
    assert counts["not for this build"] <= (9 if FULL else 5), tally.lines
