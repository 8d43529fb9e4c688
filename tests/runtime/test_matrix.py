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
from torch import nn

import visadapt
from tests.models import enliven, stir
from tests.runtime.agreement import calm, judged, run
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
    return calm(enliven(build.make())).eval()


@cache
def facts_about(name: str) -> Facts:
    """The head and the norms of a build, before anything is put in it."""
    return Facts(shared(name))


@cache
def place(name: str, method: Method) -> dict[str, Any]:
    """Where a method stands in a build, and with which policies: the first of these that it can have.

    The sites are looked for once and then passed as they were found: finding them is a trace of the backbone.

    Raises:
        VisadaptError: it can stand nowhere in this build.
    """
    model = shared(name)
    args, kwargs = next(build for build in BUILDS if build.name == name).batch(2)
    facts = facts_about(name)
    norms = "frozen" if isinstance(method, Linear | Biases | Ladder) or not facts.norms else "affine"
    heads = ({"num_classes": 4}, {"num_classes": None}) if facts.head is not None else ({},)
    refusals = []
    for where in (None, "linear", "conv") if method.kinds else (None,):
        for head in heads:
            options = {"where": where, "norms": norms, "example": args or kwargs, **head}
            try:
                if where is not None:
                    options["where"] = list(visadapt.sites(model, where, example=options["example"]))
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
