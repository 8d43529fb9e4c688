"""Groups of results, and their statistics."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import mean, quantiles, stdev
from typing import TypeVar

from visadapt.experiments.catalogue import FULL
from visadapt.experiments.record import Result

Key = TypeVar("Key", bound=Hashable)


def group_by(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """Group results by a key, in the order in which the keys first appear."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def percent_scores(results: Iterable[Result]) -> list[float]:
    """Return scores in %; a correlation of 1 is 100."""
    return [100 * result.score for result in results]


def mean_score(results: Sequence[Result]) -> float:
    """Return the mean score in %."""
    return mean(percent_scores(results))


def score_std(results: Sequence[Result]) -> float:
    """Return the standard deviation of the scores in %; 0 for a single result."""
    return stdev(percent_scores(results)) if len(results) > 1 else 0.0


def percent_trained(result: Result) -> float:
    """Return the trained parameters in % of the backbone's, both without heads."""
    return 100 * result.fraction


def gaps_to_full(results: Sequence[Result]) -> dict[str, float]:
    """Return contender → points above full fine-tuning, averaged over the problems that both were run on."""
    problems = group_by(results, lambda r: (r.network, r.problem))
    gaps: dict[str, list[float]] = {}
    for group in problems.values():
        contenders = group_by(group, lambda r: r.contender)
        if FULL in contenders:
            for name, runs in contenders.items():
                gaps.setdefault(name, []).append(mean_score(runs) - mean_score(contenders[FULL]))
    return {name: mean(values) for name, values in gaps.items()}


def paired_differences(results: Sequence[Result], others: Sequence[Result]) -> list[float]:
    """Return the points by which results are above others on the same network, problem and seed."""
    pairs = group_by(others, lambda r: (r.network, r.problem, r.seed))
    return [
        100 * (result.score - pairs[key][0].score)
        for result in results
        if (key := (result.network, result.problem, result.seed)) in pairs
    ]


def interval(differences: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean: percentiles of means of resampled differences, always the same.

    Args:
        differences: at least two values, such as those of `paired_differences`.
        draws: number of resamples.
    """
    rng = random.Random(0)
    means = [mean(rng.choices(differences, k=len(differences))) for _ in range(draws)]
    cuts = quantiles(means, n=40)
    return cuts[0], cuts[-1]
