"""How large the first weights may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import average, by_chance, counted, grouped, percent, signed, told
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STABLE = 1e-2
"""Standard deviation up to which Houlsby et al. find training stable."""

WITHIN = 1.0
"""Points between the best and the worst mean up to there that count as stable here."""

Problems = dict[tuple[str, str], list[Result]]
"""By network and problem."""


def init_scale(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``init_scale``."""
    own = [r for r in results if r.experiment == "init_scale"]
    problems = grouped(own, lambda r: (r.network, r.problem))
    if not problems:
        return None
    claims = tuple(claim for case, group in problems.items() if (claim := _stable(case, group)))
    stopped = sum(r.diverged for r in own)
    return Section(
        "init_scale",
        "How large the first weights may be",
        f"Up to a standard deviation of {STABLE:g} the score stays within {WITHIN:g} point on "
        f"{sum(claim.holds for claim in claims)} of {counted(len(claims), 'problem')}; {stopped} of {len(own)} "
        "trainings ended in numbers that are not finite.",
        "The adapters' projections are drawn with standard deviations from tiny to 1 and then trained by one recipe, "
        "as in Houlsby et al. 2019, Fig. 6, right. A line is the mean over seeds on validation data, its band reaches "
        "from the worst to the best seed.",
        (_curves(problems),),
        (_table(problems),),
        claims,
    )


def _by_std(results: Sequence[Result]) -> dict[float, list[Result]]:
    return dict(sorted(grouped(results, lambda r: float(r.facts["std"])).items()))


def _curves(problems: Problems) -> Drawing:
    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.4, "Score by the standard deviation of the adapters' first weights")
        for number, ((network, problem), group) in enumerate(problems.items()):
            by = _by_std(group)
            low, high = [min(percent(r)) for r in by.values()], [max(percent(r)) for r in by.values()]
            axes.fill_between(list(by), low, high, color=look.colour(number), alpha=0.15, linewidth=0)
            axes.plot(list(by), [average(r) for r in by.values()], label=f"{network}, {problem}", **look.series(number))
        axes.axvline(STABLE, color=look.ink, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("standard deviation of the projections at the start")
        axes.set_ylabel("validation score in %")
        look.legend(figure)
        return figure

    words = "; ".join(
        f"{network}, {problem}: " + ", ".join(f"{average(r):.1f} % at {std:g}" for std, r in _by_std(group).items())
        for (network, problem), group in problems.items()
    )
    return Drawing("init-scale", f"Curves of validation score by initial standard deviation. {words}.", draw)


def _table(problems: Problems) -> Table:
    stds = sorted({std for group in problems.values() for std in _by_std(group)})
    rows = [(*case, *(told(_by_std(group).get(std, [])) for std in stds)) for case, group in problems.items()]
    headings = ("network", "problem", *(f"{std:g}" for std in stds))
    return Table(headings, rows, "Validation score in % by standard deviation")


def _stable(case: tuple[str, str], results: Sequence[Result]) -> Claim | None:
    by = _by_std(results)
    # 1e-2 computed as a power may be a hair above
    groups = [group for std, group in by.items() if std <= STABLE * 1.001]
    small = list(map(average, groups))
    large = [average(group) for std, group in by.items() if std > STABLE * 1.001]
    if len(small) < 2:
        return None
    gap = max(small) - min(small)
    above = f"; beyond, {signed(min(large) - max(small))} points at worst" if large else ""
    return Claim(
        f"Training is stable up to a standard deviation of {STABLE:g}: means within {WITHIN:g} point",
        "Houlsby et al. 2019, §3.6",
        ", ".join(case),
        gap <= WITHIN,
        f"{gap:.1f} points between the means{by_chance(groups)}{above}",
    )
