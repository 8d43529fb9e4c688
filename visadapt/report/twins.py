"""Results that two contenders share: a bottleneck whose activation was chosen, and the one that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from visadapt.experiments.record import Result
from visadapt.report.statistics import group_by

ACTIVATION = " activation="
"""What the name of a bottleneck with a given activation has after that of the one that chooses it."""


def with_twins(results: Sequence[Result]) -> list[Result]:
    """Add the results of contenders with a given activation that are recorded as those of the one that chose it.

    A training run is done once. If ``bottleneck m=8`` chose no activation on a problem, its results there are those of
    ``bottleneck m=8 activation=None`` too, which has none of its own.

    Args:
        results: results of any experiments.

    Returns:
        The results, followed by copies under the other name.
    """
    compared = group_by([r for r in results if r.experiment == "compare"], lambda r: r.contender)
    copies = []
    for name, own in compared.items():
        stem, _, activation = name.partition(ACTIVATION)
        if not activation or " " in activation:
            continue
        known = {_run(result) for result in own}
        networks = {result.network for result in own}
        for result in compared.get(stem, ()):
            # the contender's own method is nonlinear, its variant is not
            is_linear = "variant" in result.facts
            if is_linear is (activation == "None") and result.network in networks and _run(result) not in known:
                facts = {fact: value for fact, value in result.facts.items() if fact != "variant"}
                copies.append(dataclasses.replace(result, contender=name, facts=facts))
    return [*results, *copies]


def _run(result: Result) -> tuple[object, ...]:
    return result.network, result.problem, result.seed, result.split, result.lr, result.epochs
