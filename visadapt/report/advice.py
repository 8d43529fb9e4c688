"""Which method to take: every method against full fine-tuning, with the interval of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.record import Result
from visadapt.report.claims import MAX_LOSS
from visadapt.report.formatting import join_words, pluralize, signed
from visadapt.report.statistics import (
    group_by,
    paired_differences,
    paired_interval,
    percent_trained,
    shared_problems,
)
from visadapt.table import Table

BUDGETS = (0.1, 0.5, 1.5, 3.6, 15.0)
"""Trained parameters in % of the backbone."""


@dataclass(frozen=True)
class Comparison:
    """A method against full fine-tuning of the same network, on test data of the problems that all share.

    Args:
        name: name of the contender.
        percent: trained parameters in % of the backbone.
        bytes: size of a task's file.
        points: mean difference in points; above 0 the method is better.
        low: lower end of the 95 % confidence interval of the mean over problems and seeds; it counts that test sets
            are samples too (see `visadapt.report.statistics.sampling_margin`).
        high: its upper end.
        pairs: number of pairs of equal problem and seed.
        problems: number of problems.
        validation: mean validation score over these problems at the rate and length that were chosen; None if there
            are problems without one.
    """

    name: str
    percent: float
    bytes: int
    points: float
    low: float
    high: float
    pairs: int
    problems: int = 1
    validation: float | None = None

    @property
    def interval(self) -> str:
        """The interval as text."""
        return f"{signed(self.low)} to {signed(self.high)}"

    @property
    def verdict(self) -> str:
        """Whether the interval is below, above or across 0."""
        return "below" if self.high < 0 else "above" if self.low > 0 else "no difference could be seen"


def against_full(results: Sequence[Result]) -> list[Comparison]:
    """Compare the contenders of one network with full fine-tuning, in the order of what they train.

    Args:
        results: results of the experiment ``compare`` on one network; those on validation data choose, and are not
            compared.

    Returns:
        One comparison for each contender that was run on all of `shared_problems`; none without full fine-tuning.
    """
    tests = [r for r in results if r.split == "test"]
    shared = shared_problems(tests)
    trials = group_by([r for r in results if r.split == "validation"], lambda r: r.contender)
    contenders = group_by([r for r in tests if (r.network, r.problem) in shared], lambda r: r.contender)
    comparisons = []
    for name, runs in sorted(contenders.items(), key=lambda item: percent_trained(item[1][0])):
        differences = paired_differences(runs, contenders.get(FULL, []))
        if name == FULL or {(r.network, r.problem) for r in runs} != shared or len(differences) < 2:
            continue
        low, high = paired_interval(runs, contenders.get(FULL, []))
        percent = max(map(percent_trained, runs))
        validation = validated(trials.get(name, []), shared)
        comparisons.append(
            Comparison(
                name, percent, runs[0].bytes, mean(differences), low, high, len(differences), len(shared), validation
            )
        )
    return comparisons


def validated(trials: Sequence[Result], problems: set[tuple[str, str]]) -> float | None:
    """Return a contender's mean validation score over problems, None if one has no result.

    Args:
        trials: its results on validation data.
        problems: networks and problems.
    """
    groups = group_by(trials, lambda r: (r.network, r.problem))
    if not problems or not problems <= set(groups):
        return None
    return mean(_at_best_rate(groups[problem]) for problem in problems)


def _at_best_rate(results: Sequence[Result]) -> float:
    """Return the mean score over seeds at the rate and epochs with the most seeds; among equals, the best."""
    choices = group_by(results, lambda r: (r.lr, r.epochs, r.facts.get("variant")))
    return max((len(runs), mean(r.standing for r in runs)) for runs in choices.values())[1]


def by_network(results: Sequence[Result]) -> dict[str, list[Comparison]]:
    """Compare the contenders of each network with full fine-tuning; networks without a comparison are left out."""
    compared = group_by([r for r in results if r.experiment == "compare"], lambda r: r.network)
    return {network: each for network, group in sorted(compared.items()) if (each := against_full(group))}


def taken(comparisons: Sequence[Comparison]) -> Comparison | None:
    """Return the adapter to take; None without adapters.

    The smallest that is above full fine-tuning; else the smallest that is surely within `MAX_LOSS` points of it, by its
    interval; else the one that comes nearest. A wide interval alone recommends nothing.
    """
    adapters = [c for c in comparisons if is_adapter(c.name)]
    above = [c for c in adapters if c.verdict == "above"]
    sure = [c for c in adapters if c.low > -MAX_LOSS]
    return above[0] if above else sure[0] if sure else max(adapters, key=lambda c: c.points, default=None)


def advice(results: Sequence[Result]) -> Table | None:
    """Build the answer to "which method should I take?": one row per network; None if nothing can be compared."""
    rows = []
    for network, comparisons in by_network(results).items():
        if (best := taken(comparisons)) is not None:
            rows.append((network, best.name, *_figures(best), _evidence(best)))
    headings = ("network", "take", "of backbone", "file", "points", "95 % interval", "against full fine-tuning", "on")
    title = (
        "The smallest adapter that is better than full fine-tuning on test data, else the smallest that is surely "
        f"within {MAX_LOSS:g} point of it, else the one that comes nearest; points are differences from full "
        "fine-tuning"
    )
    return Table(headings, rows, title) if rows else None


def lead(results: Sequence[Result]) -> tuple[str, ...]:
    """Answer "which method should I take?" in one sentence per network; none if nothing can be compared."""
    sentences = []
    for network, comparisons in by_network(results).items():
        best = taken(comparisons)
        if best is None:
            continue
        seen = {"above": "it is better than", "below": "it is worse than"}.get(
            best.verdict, "no difference could be seen from"
        )
        sentences.append(
            f"On {network}, take {best.name}: it trains {best.percent:.2f} % of the backbone, and {seen} full "
            f"fine-tuning ({signed(best.points)} points, 95 % interval {best.interval}, {_evidence(best)})."
        )
    return tuple(sentences)


def budgets(results: Sequence[Result]) -> Table | None:
    """Build the decision table: the method to take on each network within each budget; None without comparisons.

    Among the methods within a budget, the best on validation data is taken; where a method has no validation results,
    the best on test data. A larger budget that changes nothing is left out.
    """
    rows = []
    by_test: list[str] = []
    for network, comparisons in by_network(results).items():
        candidates = [c for c in comparisons if not c.name.startswith(FULL)]
        known = [c.validation for c in candidates if c.validation is not None]
        scores = dict(zip(candidates, known, strict=False))
        if len(known) < len(candidates):
            scores = {c: c.points for c in candidates}
            by_test.append(network)
        last = None
        for budget in BUDGETS:
            best = max((c for c in candidates if c.percent <= budget), key=lambda c: scores[c], default=None)
            if best is not None and best != last:
                rows.append((network, f"{budget:g} %", best.name, *_figures(best)))
            last = best
    headings = (
        "network", "at most", "take", "of backbone", "file", "points", "95 % interval", "against full fine-tuning"
    )  # fmt: skip
    title = "The best method on validation data that trains at most so much of the backbone"
    if by_test:
        title += f"; on test data for {join_words(by_test)}, where some have no validation results"
    return Table(headings, rows, title) if rows else None


def comparison_table(comparisons: Sequence[Comparison], title: str = "") -> Table:
    """Build the table of one network's comparisons, one row per method."""
    rows = [(c.name, *_figures(c), str(c.pairs)) for c in comparisons]
    headings = ("method", "of backbone", "file", "points", "95 % interval", "against full fine-tuning", "pairs")
    return Table(headings, rows, title)


def _evidence(comparison: Comparison) -> str:
    return f"{pluralize(comparison.problems, 'problem')}, {pluralize(comparison.pairs, 'pair')}"


def _figures(comparison: Comparison) -> tuple[str, ...]:
    size = f"{comparison.bytes / 1e6:.2f} MB"
    return (
        f"{comparison.percent:.2f} %", size, signed(comparison.points), comparison.interval, comparison.verdict
    )  # fmt: skip
