"""Report section: how large the initial weights may be."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.claims import MAX_RANGE, STABLE, STABLE_STD
from visadapt.report.clipping import Window, clipped_line
from visadapt.report.formatting import mean_and_std, pluralize, seed_spread, signed
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, mean_score, paired_differences, percent_scores
from visadapt.report.style import Drawing, Look, plain_ticks
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR = -5.0
"""Points at which the axis ends: below it training has failed, and what counts is how little it varies above."""

Problems = dict[tuple[str, str], list[Result]]
"""Results by network and problem."""


def init_scale(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``init_scale``; None without results."""
    scaled = [r for r in results if r.experiment == "init_scale"]
    problems = group_by(scaled, lambda r: (r.network, r.problem))
    if not problems:
        return None
    networks = group_by(scaled, lambda r: r.network)
    claims = tuple(claim for network, group in networks.items() if (claim := _stable(network, group)))
    diverged, stable = sum(r.diverged for r in scaled), sum(claim.holds is True for claim in claims)
    return Section(
        "init_scale",
        "How large the initial weights may be",
        f"Up to a standard deviation of {STABLE_STD:g} the score stays within {MAX_RANGE:g} point on "
        f"{stable} of {pluralize(len(claims), 'network')}; {diverged} of {len(scaled)} "
        "training runs ended in numbers that are not finite.",
        "The adapters' projections are initialised with standard deviations up to 1 and trained with one recipe, as in "
        "Houlsby et al. 2019, Fig. 6, right. Lines are means over seeds on validation data, bands their range. The "
        "claim takes the best and the worst standard deviation of each problem, paired by seed.",
        (_curves(problems),),
        (_table(problems),),
        claims,
    )


def _by_std(results: Sequence[Result]) -> dict[float, list[Result]]:
    return dict(sorted(group_by(results, lambda r: float(r.facts["std"])).items()))


def _changes(results: Sequence[Result]) -> dict[float, float]:
    """Return standard deviation → points relative to the smallest one, means over seeds."""
    means = {std: mean_score(runs) for std, runs in _by_std(results).items()}
    start = next(iter(means.values()))
    return {std: score - start for std, score in means.items()}


def _curves(problems: Problems) -> Drawing:
    changes = {case: _changes(group) for case, group in problems.items()}
    least = min(change for by in changes.values() for change in by.values())
    visible = Window(low=FLOOR) if least < FLOOR else Window()

    def draw(look: Look) -> Figure:
        title = "Score by the standard deviation of the adapters' initial weights, relative to the smallest one"
        figure, (axes,) = look.panels(1, 3.4, title)
        for number, (case, group) in enumerate(problems.items()):
            by, start = _by_std(group), mean_score(next(iter(_by_std(group).values())))
            low, high = ([visible.clip(of(percent_scores(runs)) - start) for runs in by.values()] for of in (min, max))
            axes.fill_between(list(by), low, high, color=look.colour(number), alpha=0.15, linewidth=0)
            values = list(changes[case].values())
            clipped_line(axes, visible, list(by), values, number, label=", ".join(case), **look.series(number))
        axes.axvline(STABLE_STD, color=look.ink, linewidth=0.8, linestyle=":")
        axes.axhline(0, color=look.ink, linewidth=0.8)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_xlabel("initial standard deviation of the projections")
        axes.set_ylabel(visible.label("points on validation data"))
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


def _stable(network: str, results: Sequence[Result]) -> Claim | None:
    differences, ranges, drops = [], [], []
    small: list[list[Result]] = []
    for group in group_by(results, lambda r: r.problem).values():
        by = _by_std(group)
        # 1e-2 computed as a power of 10 may be slightly larger
        stable = [runs for std, runs in by.items() if std <= STABLE_STD * 1.001]
        if len(stable) < 2:
            continue
        best, worst = max(stable, key=mean_score), min(stable, key=mean_score)
        differences += paired_differences(best, worst)
        ranges.append(mean_score(best) - mean_score(worst))
        drops += [mean_score(runs) - mean_score(best) for std, runs in by.items() if std > STABLE_STD * 1.001]
        small += stable
    if not ranges:
        return None
    above = f"; above it {signed(min(drops))} points at worst" if drops else ""
    return STABLE.tested(
        network,
        at_least([MAX_RANGE - each for each in differences]),
        f"range of the means {mean(ranges):.1f} points, mean of {pluralize(len(ranges), 'problem')}"
        f"{seed_spread(small)}{above}",
        sum(map(len, small)),
        results[0].modality,
    )
