"""Fair comparisons: contenders whose rate, epochs and activation are chosen on validation data, all with equal care."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from visadapt.errors import VisadaptError
from visadapt.experiments.catalogue import FULL, contender, is_adapter
from visadapt.experiments.choice import MAX_EXTENSIONS
from visadapt.experiments.compare import Compare
from visadapt.experiments.contenders import Contender
from visadapt.experiments.crossmodal import Crossmodal
from visadapt.experiments.problems import Problem
from visadapt.methods import Bottleneck, Linear
from visadapt.runtime.costs import summary

LENGTHS = {"image": (5, 9, 20), "text": (3, 9, 20)}
"""Numbers of epochs to choose from, by modality."""

LEAST_STEPS = 100
"""Steps that the shortest training run should have: of fewer, every rate leaves the head the linear probe that it
started as, and full fine-tuning would be compared untrained."""

BATCH_SIZES = {"image": 32, "text": 16}

PROBE = "linear probe"
"""Name of the contender that trains a head only."""

COMPARED = (PROBE, "bottleneck m=8", FULL)
"""Contenders of a comparison that names none."""


def fair_contender(
    name: str, modality: str, lengths: Sequence[int] | None = None, fast: bool = False, batch_size: int | None = None
) -> Contender:
    """Build a contender of the catalogue that is chosen and trained like all others of a comparison.

    The learning rates are extended while the best is at an edge, the number of epochs is chosen, the state after the
    best epoch on validation data is kept, and a new head starts as the linear probe. A bottleneck that names no
    activation is also tried without one. A linear probe is the better of the regularised solution and 30 epochs of
    training, on features in single precision.

    Args:
        name: as `visadapt.experiments.contender` takes it.
        modality: ``image`` or ``text``.
        lengths: numbers of epochs to choose from; None for those in `LENGTHS`.
        fast: compute in bf16 autocast.
        batch_size: samples per step; None for that in `BATCH_SIZES`.

    Returns:
        The contender.

    Raises:
        VisadaptError: as `visadapt.experiments.contender`.
    """
    epochs = tuple(lengths or LENGTHS[modality])
    base = contender(name, epochs[0])
    settled = dataclasses.replace(base, extend=True, validated=True).with_recipe(
        batch_size=batch_size or BATCH_SIZES[modality]
    )
    if isinstance(base.method, Linear):
        return settled
    variants: tuple[Bottleneck, ...] = ()
    if isinstance(base.method, Bottleneck) and "activation" not in name:
        variants = (dataclasses.replace(base.method, activation=None),)
    return dataclasses.replace(settled, lengths=epochs, variants=variants).with_recipe(fast=fast)


def lengths_of(problem: Problem) -> tuple[int, ...]:
    """Return the numbers of epochs to choose from: those in `LENGTHS`, or a multiple of them where samples are few.

    Args:
        problem: the problem; its data is loaded.
    """
    lengths = LENGTHS[problem.modality]
    steps = lengths[0] * math.ceil(len(problem.splits.train) / BATCH_SIZES[problem.modality])
    return tuple(math.ceil(LEAST_STEPS / steps) * length for length in lengths)


def comparisons(
    problems: Sequence[Problem], names: Sequence[str], seeds: tuple[int, ...], lengths: tuple[int, ...], fast: bool
) -> list[Compare]:
    """Build the fair comparisons of contenders on problems, one per modality and numbers of epochs.

    Args:
        problems: problems to compare on.
        names: names of contenders; none for those in `COMPARED`.
        seeds: one final training run each.
        lengths: numbers of epochs to choose from; none for those of `lengths_of`, for which the data is loaded.
        fast: compute in bf16 autocast.
    """
    alike: dict[tuple[str, tuple[int, ...]], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.modality, lengths or lengths_of(problem)), []).append(problem)
    plans = []
    for (modality, epochs), group in alike.items():
        contenders = tuple(fair_contender(name, modality, epochs, fast) for name in names or COMPARED)
        # files of adapters are small: the best trial is also the final run of its seed
        kept = tuple(each.name for each in contenders if is_adapter(each.name))
        plans.append(Compare(tuple(group), contenders, seeds, "both", kept))
    return plans


def matched(
    problems: Sequence[Problem], name: str, seeds: tuple[int, ...], lengths: tuple[int, ...], fast: bool
) -> Crossmodal:
    """Build the fair comparison of a bottleneck, the linear probe and full fine-tuning on several backbones.

    Args:
        problems: problems, on any backbones.
        name: the bottleneck of the first problem; on other backbones it has the width with which the trained fraction
            comes nearest to that.
        seeds: one final training run each.
        lengths: numbers of epochs to choose from; none for those of `lengths_of`.
        fast: compute in bf16 autocast.

    Raises:
        VisadaptError: the contender is not a bottleneck with a whole number as its width.
    """
    first = contender(name)
    if not isinstance(first.method, Bottleneck) or not isinstance(first.method.m, int):
        raise VisadaptError(f"--contender of crossmodal must be a bottleneck such as 'bottleneck m=8', got {name!r}")
    fraction, groups = trained_fraction(problems[0], first), []
    for problem in problems:
        width = width_of(problem, first, fraction)
        own = re.sub(r"\bm=\d+", f"m={width}", first.name)
        epochs = lengths or lengths_of(problem)
        names = (FULL, PROBE, own)
        groups.append(tuple(fair_contender(each, problem.modality, epochs, fast) for each in names))
    return Crossmodal(tuple(problems), tuple(groups), seeds)


def trained_fraction(problem: Problem, who: Contender) -> float:
    """Return what a contender trains of a problem's backbone, both without heads."""
    model = who.put(problem, 0)
    table = summary(model)
    row = table[problem.name]
    return (row.adapters + row.norms) / table.backbone


def width_of(problem: Problem, bottleneck: Contender, fraction: float) -> int:
    """Return the width with which a bottleneck trains about a fraction of a problem's backbone, at least 1."""
    method = bottleneck.method
    assert isinstance(method, Bottleneck)
    one, two = (
        trained_fraction(problem, dataclasses.replace(bottleneck, method=dataclasses.replace(method, m=m)))
        for m in (1, 2)
    )
    return max(1, round(1 + (fraction - one) / (two - one)))


def costs(contenders: Sequence[Contender], seeds: int) -> list[str]:
    """Describe what a fair comparison computes on each problem, one line per contender.

    Args:
        contenders: the contenders.
        seeds: number of final training runs of each.
    """
    lines = []
    for each in contenders:
        lengths = each.lengths or (each.recipe.epochs,)
        least = len(each.rates) + (len(lengths) > 1) + len(each.variants)
        most = len(each.rates) + MAX_EXTENSIONS + len(lengths) - 1 + len(each.variants)
        epochs = ", ".join(map(str, lengths))
        lines.append(
            f"{each.name}: per problem {least} to {most} training runs to choose by, then {seeds}; "
            f"epochs {epochs}; batches of {each.recipe.batch_size}; {'bf16 autocast' if each.recipe.fast else 'fp32'}"
        )
    return lines
