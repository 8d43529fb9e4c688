"""Report section: how large the initial weights may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.formatting import mean_and_std, pluralize, seed_spread, signed
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, mean_score, paired_differences, percent_scores
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STABLE = 1e-2
"""Standard deviation up to which Houlsby et al. find training stable."""

MAX_RANGE = 1.0
"""Largest difference in points between the means up to there that counts as stable."""

Problems = dict[tuple[str, str], list[Result]]
"""Results by network and problem."""


def init_scale(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``init_scale``; None without results."""
    scaled = [r for r in results if r.experiment == "init_scale"]
    problems = group_by(scaled, lambda r: (r.network, r.problem))
    if not problems:
        return None
    claims = tuple(claim for case, group in problems.items() if (claim := _stable(case, group)))
    diverged, stable = sum(r.diverged for r in scaled), sum(claim.holds is True for claim in claims)
    return Section(
        "init_scale",
        "How large the initial weights may be",
        f"Up to a standard deviation of {STABLE:g} the score stays within {MAX_RANGE:g} point on "
        f"{stable} of {pluralize(len(claims), 'problem')}; {diverged} of {len(scaled)} "
        "training runs ended in numbers that are not finite.",
        "The adapters' projections are initialised with standard deviations up to 1 and trained with one recipe, as in "
        "Houlsby et al. 2019, Fig. 6, right. Lines are means over seeds on validation data, bands their range.",
        (_curves(problems),),
        (_table(problems),),
        claims,
    )


def _by_std(results: Sequence[Result]) -> dict[float, list[Result]]:
    return dict(sorted(group_by(results, lambda r: float(r.facts["std"])).items()))


def _curves(problems: Problems) -> Drawing:
    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.4, "Score by the standard deviation of the adapters' initial weights")
        for number, ((network, problem), group) in enumerate(problems.items()):
            by = _by_std(group)
            low, high = [min(percent_scores(r)) for r in by.values()], [max(percent_scores(r)) for r in by.values()]
            axes.fill_between(list(by), low, high, color=look.colour(number), alpha=0.15, linewidth=0)
            means = [mean_score(r) for r in by.values()]
            axes.plot(list(by), means, label=f"{network}, {problem}", **look.series(number))
        axes.axvline(STABLE, color=look.ink, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("initial standard deviation of the projections")
        axes.set_ylabel("validation score in %")
        look.legend(figure)
        return figure

    values = "; ".join(
        f"{network}, {problem}: " + ", ".join(f"{mean_score(r):.1f} % at {std:g}" for std, r in _by_std(group).items())
        for (network, problem), group in problems.items()
    )
    return Drawing("init-scale", f"Curves of validation score by initial standard deviation. {values}.", draw)


def _table(problems: Problems) -> Table:
    stds = sorted({std for group in problems.values() for std in _by_std(group)})
    rows = [(*case, *(mean_and_std(_by_std(group).get(std, [])) for std in stds)) for case, group in problems.items()]
    headings = ("network", "problem", *(f"{std:g}" for std in stds))
    return Table(headings, rows, "Validation score in % by standard deviation")


def _stable(case: tuple[str, str], results: Sequence[Result]) -> Claim | None:
    by = _by_std(results)
    # 1e-2 computed as a power of 10 may be slightly larger
    groups = [group for std, group in by.items() if std <= STABLE * 1.001]
    small = list(map(mean_score, groups))
    large = [mean_score(group) for std, group in by.items() if std > STABLE * 1.001]
    if len(small) < 2:
        return None
    gap = max(small) - min(small)
    best, worst = groups[small.index(max(small))], groups[small.index(min(small))]
    above = f"; above it {signed(min(large) - max(small))} points at worst" if large else ""
    return Claim(
        f"Training is stable up to a standard deviation of {STABLE:g}: means within {MAX_RANGE:g} point",
        "Houlsby et al. 2019, §3.6",
        ", ".join(case),
        at_least([MAX_RANGE - each for each in paired_differences(best, worst)]),
        f"range of the means {gap:.1f} points{seed_spread(groups)}{above}",
        sum(map(len, groups)),
    )
