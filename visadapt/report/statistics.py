"""Groups of results, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from statistics import mean, stdev
from typing import TypeVar

from visadapt.experiments.catalogue import FULL, is_adapter
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


def shared_problems(results: Sequence[Result]) -> set[tuple[str, str]]:
    """Return the networks and problems that methods are compared on: those with full fine-tuning and an adapter.

    Means over different problems cannot be compared. Of a run that is not finished these are the problems of the
    adapter that was run on most of them; among equals, those that most contenders were run on.
    """
    problems = {
        name: {(r.network, r.problem) for r in runs} for name, runs in group_by(results, lambda r: r.contender).items()
    }
    full = problems.pop(FULL, set())
    sets = [own & full for name, own in problems.items() if is_adapter(name) and own & full]
    return max(sets, key=lambda own: (len(own), sum(own <= other for other in problems.values())), default=set())


def paired_differences(results: Sequence[Result], others: Sequence[Result]) -> list[float]:
    """Return the points by which results are above others on the same network, problem and seed."""
    pairs = group_by(others, lambda r: (r.network, r.problem, r.seed))
    return [
        100 * (result.score - pairs[key][0].score)
        for result in results
        if (key := (result.network, result.problem, result.seed)) in pairs
    ]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean by Student's t distribution.

    It is honest for few values too, unlike percentiles of resampled means, which are too narrow then.

    Args:
        differences: at least two values, such as those of `paired_differences`.
    """
    center = mean(differences)
    margin = t_quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return center - margin, center + margin


def paired_interval(results: Sequence[Result], others: Sequence[Result]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of `paired_differences`, by `interval` and `sampling_margin`.

    Args:
        results: as `paired_differences` takes them, at least two pairs.
        others: as there.
    """
    differences = paired_differences(results, others)
    low, high = interval(differences)
    center, half = mean(differences), math.hypot((high - low) / 2, sampling_margin(results, others))
    return center - half, center + half


def sampling_margin(results: Sequence[Result], others: Sequence[Result]) -> float:
    """Return by how many points the mean of paired differences may be off since test sets are samples, at least.

    All seeds share the test set of their problem, so that the spread over seeds does not show it: on 12 samples each of
    three seeds may differ by the same one sample. Two accuracies that differ by d on n samples have at least d·n
    samples of which just one is right; with no others the variance of d is (d − d²)/n (McNemar 1947).

    Args:
        results: as `paired_differences` takes them.
        others: as there.

    Returns:
        1.96 standard deviations; 0 for other metrics than accuracy, and where the number of samples is not known.
    """
    variance, problems = 0.0, group_by(results, lambda r: (r.network, r.problem))
    for runs in problems.values():
        differences = paired_differences(runs, others)
        if differences and runs[0].metric == "accuracy" and runs[0].samples is not None:
            share = abs(mean(differences)) / 100
            variance += (share - share**2) / runs[0].samples
    return 196 * math.sqrt(variance) / max(1, len(problems))


def at_least(values: Sequence[float], threshold: float = 0.0) -> bool | None:
    """Whether a mean is at least a threshold, by its 95 % confidence interval; None if that cannot be decided.

    Args:
        values: such as paired differences; fewer than two decide nothing.
        threshold: the threshold.
    """
    if len(values) < 2:
        return None
    low, high = interval(values)
    return True if low >= threshold else False if high < threshold else None


@cache
def t_quantile(freedom: int, level: float = 0.975) -> float:
    """Return a quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        freedom: degrees of freedom, at least 1.
        level: probability below the quantile, in (0.5, 1).
    """
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    # with t = sqrt(freedom) tan(angle) the density is a power of the cosine on a bounded interval

    def below(angle: float, parts: int = 200) -> float:
        points = [math.cos(angle * i / parts) ** (freedom - 1) for i in range(parts + 1)]
        weighted = points[0] + points[-1] + 4 * sum(points[1:-1:2]) + 2 * sum(points[2:-1:2])
        return 0.5 + constant * angle / (3 * parts) * weighted

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
