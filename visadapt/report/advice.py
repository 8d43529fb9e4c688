"""Which method to take: every method against full fine-tuning, with the interval of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.record import Result
from visadapt.report.formatting import pluralize, signed
from visadapt.report.statistics import group_by, interval, paired_differences, percent_trained
from visadapt.table import Table


@dataclass(frozen=True)
class Comparison:
    """A method against full fine-tuning of the same network, on test data of all its problems.

    Args:
        name: name of the contender.
        percent: trained parameters in % of the backbone.
        bytes: size of a task's file.
        points: mean difference in points; above 0 the method is better.
        low: lower end of the 95 % confidence interval of the mean over problems and seeds.
        high: its upper end.
        pairs: number of pairs of equal problem and seed.
    """

    name: str
    percent: float
    bytes: int
    points: float
    low: float
    high: float
    pairs: int

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
        results: test results of the experiment ``compare`` on one network.

    Returns:
        One comparison for each contender that was run on all problems; none without full fine-tuning.
    """
    contenders = group_by(results, lambda r: r.contender)
    problems = {r.problem for r in results}
    comparisons = []
    for name, runs in sorted(contenders.items(), key=lambda item: percent_trained(item[1][0])):
        differences = paired_differences(runs, contenders.get(FULL, []))
        if name == FULL or {r.problem for r in runs} != problems or len(differences) < 2:
            continue
        low, high = interval(differences)
        percent = max(map(percent_trained, runs))
        comparisons.append(Comparison(name, percent, runs[0].bytes, mean(differences), low, high, len(differences)))
    return comparisons


def advice(results: Sequence[Result]) -> Table | None:
    """Build the answer to "which method should I take?": one row per network; None if nothing can be compared.

    The row is the smallest adapter that is above full fine-tuning; else the smallest of which no difference could be
    seen; else the one that comes nearest.
    """
    tests = [r for r in results if r.experiment == "compare" and r.split == "test"]
    rows = []
    for network, group in group_by(tests, lambda r: r.network).items():
        adapters = [c for c in against_full(group) if is_adapter(c.name)]
        if not adapters:
            continue
        above = [c for c in adapters if c.verdict == "above"]
        even = [c for c in adapters if c.verdict != "below"]
        best = above[0] if above else even[0] if even else max(adapters, key=lambda c: c.points)
        problems = pluralize(len({r.problem for r in group}), "problem")
        size = f"{best.bytes / 1e6:.2f} MB"
        rows.append((network, best.name, f"{best.percent:.2f} %", size, signed(best.points), best.interval, problems))
    headings = ("network", "take", "of backbone", "file", "points", "95 % interval", "on")
    title = (
        "The smallest adapter that is not below full fine-tuning on test data, or the one that comes nearest; points "
        "are differences from full fine-tuning"
    )
    return Table(headings, rows, title) if rows else None
