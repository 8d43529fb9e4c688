"""One number for many domains."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.section import Section
from visadapt.report.statistics import file_name, grouped, listed, told
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Case = tuple[str, ...]
"""A network, and the problems that are summed up."""

Sums = dict[str, list[Result]]
"""By contender."""


def decathlon(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``decathlon``."""
    own = [r for r in results if r.experiment == "decathlon"]
    sums = [r for r in own if r.metric == "decathlon"]
    made = grouped(sums, lambda r: (r.network, *r.facts["problems"]))
    cases = {case: grouped(_newest(group), lambda r: r.contender) for case, group in made.items()}
    if not cases:
        return None
    return Section(
        "decathlon",
        "One number for many domains",
        f"{'; '.join(_best(case, by) for case, by in cases.items())}.",
        "The score of the Visual Decathlon (Rebuffi et al. 2017, §4) over the domains at hand: 1,000 for a domain "
        "without an error, 250 for full fine-tuning, nothing for twice its error. Bars are means over seeds, whiskers "
        "reach from the lowest to the highest.",
        tuple(_bars(case, by) for case, by in cases.items()),
        tuple(_table(case, own, by) for case, by in cases.items()),
    )


def _newest(sums: Sequence[Result]) -> list[Result]:
    """Those that are relative to the baseline over the most seeds; with further seeds, all are made again."""
    seeds = max(r.facts.get("seeds", 0) for r in sums)
    return [r for r in sums if r.facts.get("seeds", 0) == seeds]


def _score(sums: Sequence[Result]) -> float:
    return mean(r.score for r in sums)


def _best(case: Case, sums: Sums) -> str:
    network, *problems = case
    best = max(sums, key=lambda name: _score(sums[name]))
    return (
        f"{best} scores highest, {_score(sums[best]):,.0f} of {1000 * len(problems):,}, over {listed(problems)} "
        f"({network})"
    )


def _bars(case: Case, sums: Sums) -> Drawing:
    network, *problems = case
    names = sorted(sums, key=lambda name: _score(sums[name]))
    means = [_score(sums[name]) for name in names]
    scores = [[r.score for r in sums[name]] for name in names]
    par = 250 * len(problems)

    def draw(look: Look) -> Figure:
        title = f"{network}: decathlon score over {len(problems)} domains"
        figure, (axes,) = look.panels(1, 0.9 + 0.3 * len(names), title)
        down = [centre - min(each) for each, centre in zip(scores, means, strict=True)]
        up = [max(each) - centre for each, centre in zip(scores, means, strict=True)]
        axes.barh(names, means, xerr=[down, up], color=look.colour(0), ecolor=look.ink, capsize=2)
        axes.axvline(par, color=look.ink, linewidth=0.8, linestyle=":")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"score; {par:,} (dotted) is full fine-tuning's")
        return figure

    words = "; ".join(f"{name} {centre:,.0f}" for name, centre in zip(names, means, strict=True))
    alt = f"Bars of the decathlon score on {network} over {listed(problems)}: {words}."
    return Drawing(file_name("decathlon", *case), alt, draw)


def _table(case: Case, results: Sequence[Result], sums: Sums) -> Table:
    network, *problems = case
    tests = grouped(
        [r for r in results if (r.network, r.split) == (network, "test")], lambda r: (r.contender, r.problem)
    )
    rows = [
        (
            name,
            *(told(tests.get((name, problem), [])) for problem in problems),
            f"{_score(group):,.0f}",
            f"{group[0].facts['total']:.2f}",
        )
        for name, group in sums.items()
    ]
    headings = ("method", *problems, "score", "parameters / backbone")
    return Table(headings, rows, f"{network}: accuracy in % by domain, and the score")
