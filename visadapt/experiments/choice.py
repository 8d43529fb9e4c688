"""The choice of a contender's learning rate and number of epochs on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from visadapt.experiments.contenders import Contender
from visadapt.experiments.record import Result

MAX_EXTENSIONS = 4
"""Number of rates that may be tried beyond those of a contender."""

ResultOf = Callable[[Contender], "Result | None"]


def choose(contender: Contender, result_of: ResultOf) -> tuple[list[Contender], Contender | None]:
    """Choose the learning rate at the smallest number of epochs, then the number of epochs, then the variant.

    The rates are extended beyond the first or the last while that one is better than its neighbour (see `next_rate`);
    larger numbers of epochs are tried in turn while each is at least as good as the best before. Among equal rates the
    middle one is taken, as the lowest would be the one that trains least; among other equals the fewer epochs and the
    contender's own method.

    Args:
        contender: the contender to choose for.
        result_of: returns the validation result of a candidate, or None if it does not exist yet.

    Returns:
        All candidates that were wanted so far, and the chosen one; None while results are missing.
    """
    if contender.lengths:
        contender = contender.with_recipe(epochs=contender.lengths[0])
    rates = list(contender.rates) if len(contender.rates) > 1 else [contender.recipe.lr]
    tried: dict[float, Contender] = {rate: contender.with_recipe(lr=rate) for rate in rates}
    if len(rates) == 1 and len(contender.lengths) < 2 and not contender.variants:
        return [], contender
    while True:
        wanted, scores = list(tried.values()), _standings(tried.values(), result_of)
        if scores is None:
            return wanted, None
        rates = sorted(tried)
        by_rate = dict(zip(tried, scores, strict=True))
        equals = [rate for rate in rates if by_rate[rate] == max(scores)]
        best = equals[(len(equals) - 1) // 2]
        further = _beyond(rates, best, by_rate) if contender.extend else None
        if further is None or len(tried) >= len(contender.rates) + MAX_EXTENSIONS:
            break
        tried[further] = contender.with_recipe(lr=further)
    chosen = tried[best]
    standing = by_rate[best]
    for epochs in contender.lengths[1:]:
        longer = chosen.with_recipe(epochs=epochs)
        wanted.append(longer)
        scores = _standings([longer], result_of)
        if scores is None:
            return wanted, None
        if scores[0] < standing:
            break
        # on few validation samples nothing may change before the last number of epochs
        if scores[0] > standing:
            chosen, standing = longer, scores[0]
    variants = [chosen.with_variant(method) for method in contender.variants]
    scores = _standings(variants, result_of)
    if scores is None:
        return [*wanted, *variants], None
    for variant, score in zip(variants, scores, strict=True):
        if score > standing:
            chosen, standing = variant, score
    return [*wanted, *variants], chosen


def _standings(candidates: Iterable[Contender], result_of: ResultOf) -> list[float] | None:
    """Return the candidates' scores, minus infinity for those that diverged; None if one is missing."""
    results = [result_of(candidate) for candidate in candidates]
    known = [result.standing for result in results if result is not None]
    return known if len(known) == len(results) else None


def _beyond(rates: Sequence[float], best: float, scores: dict[float, float]) -> float | None:
    """Return the rate to try beyond the best one; None if it is not at an edge, or no better than its neighbour."""
    if len(rates) < 2:
        return None
    for edge, neighbour, up in ((rates[0], rates[1], False), (rates[-1], rates[-2], True)):
        if best == edge and scores[edge] > scores[neighbour]:
            return next_rate(edge, up)
    return None


def next_rate(rate: float, up: bool) -> float:
    """Return the next larger or smaller rate of the series 1, 3, 10, 30, …, at least 1.5 times as large or small."""
    power = math.floor(math.log10(rate))
    series = sorted(float(f"{digit}e{power + shift}") for shift in (-2, -1, 0, 1, 2) for digit in (1, 3))
    if up:
        return next(each for each in series if each > 1.5 * rate)
    return next(each for each in reversed(series) if each < rate / 1.5)
