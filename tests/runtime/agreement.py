"""Whether a mixed batch of three tasks gives each sample what its task alone gives it, on a model of any build."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import visadapt
from tests.runtime.builds import Build
from visadapt import VisadaptError

TASKS = ["b", "a", "c", "a", "b"]
"""An odd order; c is a task of another method, with norms or a head of its own where there can be any."""

TRAINED = [*TASKS, "c"]
"""In train mode every task has two samples at least.

Torch's gradients of an eval-mode BatchNorm2d for a batch of one are wrong where its output's gradient is not
contiguous; test_driven.py shows it without this library.
"""

TOLERANCE = 1e-5


def calm(model: nn.Module) -> nn.Module:
    """Takes all randomness out of a model in train mode: dropout and whole branches left out."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
        for key, value in module.__dict__.items():
            if isinstance(value, float) and ("drop" in key or key == "survival_prob"):
                module.__dict__[key] = 0.0
    return model


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


def outputs(
    build: Build, model: nn.Module, given: Any, tasks: list[str], together: bool
) -> Iterator[tuple[list[int], list[Any]]]:
    """Numbers of samples and their outputs: all at once, or each task's alone."""
    if together:
        yield list(range(len(tasks))), build.samples(run(model, given, tasks), len(tasks))
        return
    for task in dict.fromkeys(tasks):
        index = [i for i, each in enumerate(tasks) if each == task]
        yield index, build.samples(run(model, build.part(given, index), task), len(index))


def compare(build: Build, model: nn.Module, training: bool) -> float:
    """How much a mixed batch differs from each task alone: outputs, and in train mode gradients."""
    tasks = TRAINED if training else TASKS
    given = build.batch(len(tasks))
    model.train(training)
    samples, grads = [], []
    loss = Weighted()
    trained = [p for task in "abc" for p in visadapt.parameters(model, task)]
    for together in (True, False):
        for p in trained:
            p.grad = None
        found: dict[int, list[Tensor]] = {}
        with torch.set_grad_enabled(training):
            for index, each in outputs(build, model, given, tasks, together):
                found |= zip(index, each, strict=True)
                if training:
                    loss(each, index).backward()
        samples.append([found[i] for i in range(len(tasks))])
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


def judged(build: Build, model: nn.Module, training: bool) -> tuple[str, str]:
    """Whether the three tasks of a model are right in a mixed batch, and what is to be said about it."""
    try:
        apart = compare(build, model, training)
    except VisadaptError as error:
        return "refused", str(error)
    return "right" if apart <= TOLERANCE else "wrong", f"train={training}: {apart:.1e}"
