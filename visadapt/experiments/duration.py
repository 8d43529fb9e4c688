"""How long a comparison will take, from a few steps of each contender."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from visadapt.experiments.base import Experiment
from visadapt.experiments.choice import MAX_EXTENSIONS
from visadapt.experiments.compare import Compare
from visadapt.experiments.contenders import Contender
from visadapt.experiments.crossmodal import Crossmodal
from visadapt.experiments.problems import Problem
from visadapt.experiments.record import Record
from visadapt.experiments.stream import Plan
from visadapt.methods import Linear
from visadapt.training import Samples, fit

STEPS = 2
"""Steps that are timed."""

FORWARD = 1 / 3
"""Share of a training step that its forward pass takes: the backward pass has about twice the products."""


def seconds_per_step(problem: Problem, contender: Contender, device: str) -> float:
    """Train a new task for a few steps, and return the seconds of one.

    Args:
        problem: the problem; its data is loaded.
        contender: the contender.
        device: device to compute on.
    """
    data, recipe = problem.splits.train, contender.recipe.replace(epochs=1, head_first=False, compile=None)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).repeat(1 + STEPS * recipe.batch_size)
    model, seconds = contender.put(problem, 0), 0.0
    # the first step takes longer
    for count in (1, STEPS):
        part = Samples(*data.take(order[: count * recipe.batch_size]))
        begun = time.perf_counter()
        fit(
            model, problem.name, part, None, recipe, prepare=problem.prepare, augment=problem.augmentation(),
            device=device, progress=False,
        )  # fmt: skip
        seconds = (time.perf_counter() - begun) / count
    return seconds


def forecast(plans: Iterable[Compare | Crossmodal], device: str) -> tuple[float, float]:
    """Return the least and the most seconds that fair comparisons will take in one process.

    The steps of a contender are timed on the first problem of each backbone. A linear probe takes a few seconds, and is
    left out.

    Args:
        plans: the comparisons.
        device: device to compute on.
    """
    least = most = 0.0
    for plan in plans:
        known: dict[tuple[str, str], float] = {}
        for problem, contenders in by_problem(plan):
            for each in (each for each in contenders if not isinstance(each.method, Linear)):
                key = problem.network, each.name
                if key not in known:
                    known[key] = seconds_per_step(problem, each, device)
                low, high = _runs(each, len(plan.seeds))
                least += known[key] * sum(_steps(problem, each, epochs) for epochs in low)
                most += known[key] * sum(_steps(problem, each, epochs) for epochs in high)
    return least, most


def by_problem(plan: Compare | Crossmodal) -> list[tuple[Problem, tuple[Contender, ...]]]:
    """Return each problem of a comparison with its contenders."""
    if isinstance(plan, Crossmodal):
        return list(zip(plan.problems, plan.contenders, strict=True))
    return [(problem, plan.contenders) for problem in plan.problems]


def finished(plans: Iterable[Experiment], folder: Path) -> bool:
    """Whether a folder has all results of experiments, so that nothing will be trained."""
    record = Record(folder)
    asked = [Plan(plan, record, None) for plan in plans]
    for plan in asked:
        plan.ask()
    return not any(plan.todo for plan in asked)


def readable(seconds: float) -> str:
    """Format a duration: ``40 s``, ``25 min``, ``3.5 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{max(1, seconds):.0f} s"


def _runs(contender: Contender, seeds: int) -> tuple[list[int], list[int]]:
    """The epochs of each training run, if the choice ends as early and as late as it can."""
    first, *longer = contender.lengths or (contender.recipe.epochs,)
    rates, variants = len(contender.rates), len(contender.variants)
    last = longer[-1] if longer else first
    return (
        [first] * (rates + variants + seeds - 1) + longer[:1],
        [first] * (rates + MAX_EXTENSIONS) + longer + [last] * (variants + seeds),
    )


def _steps(problem: Problem, contender: Contender, epochs: int) -> float:
    """The training steps that take as long as a training run with its measurements."""
    data, size = problem.splits, contender.recipe.batch_size
    passes = len(data.train) + epochs * len(data.validation) + len(data.validation) + len(data.test)
    return epochs * math.ceil(len(data.train) / size) + FORWARD * passes / size
