"""One number for many domains."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.look import Drawing, Look
from visadapt.report.numbers import grouped, listed, told
from visadapt.report.section import Section
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def decathlon(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``decathlon``."""
    own = [r for r in results if r.experiment == "decathlon"]
    sums = grouped([r for r in own if r.metric == "decathlon"], lambda r: r.contender)
    if not sums:
        return None
    scores = {name: [r.score for r in group] for name, group in sums.items()}
    best = max(scores, key=lambda name: mean(scores[name]))
    problems = sums[best][0].facts["problems"]
    return Section(
        "decathlon",
        "One number for many domains",
        f"{best} scores highest, {mean(scores[best]):,.0f} of {1000 * len(problems):,}, over {listed(problems)}.",
        "The score of the Visual Decathlon (Rebuffi et al. 2017, §4) over the domains at hand: 1,000 for a domain "
        "without an error, 250 for full fine-tuning, nothing for twice its error. Bars are means over seeds, whiskers "
        "reach from the lowest to the highest.",
        (_bars(scores, len(problems)),),
        (_table(own, sums, problems),),
    )


def _bars(scores: dict[str, list[float]], problems: int) -> Drawing:
    names = sorted(scores, key=lambda name: mean(scores[name]))
    means = [mean(scores[name]) for name in names]

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 0.9 + 0.3 * len(names), f"Decathlon score over {problems} domains")
        down = [centre - min(scores[name]) for name, centre in zip(names, means, strict=True)]
        up = [max(scores[name]) - centre for name, centre in zip(names, means, strict=True)]
        axes.barh(names, means, xerr=[down, up], color=look.colour(0), ecolor=look.ink, capsize=2)
        axes.axvline(250 * problems, color=look.ink, linewidth=0.8, linestyle=":")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"score; {250 * problems:,} (dotted) is full fine-tuning's")
        return figure

    words = "; ".join(f"{name} {centre:,.0f}" for name, centre in zip(names, means, strict=True))
    return Drawing("decathlon", f"Bars of the decathlon score: {words}.", draw)


def _table(results: Sequence[Result], sums: dict[str, list[Result]], problems: Sequence[str]) -> Table:
    tests = grouped([r for r in results if r.split == "test"], lambda r: (r.contender, r.problem))
    rows = [
        (
            name,
            *(told(tests.get((name, problem), [])) for problem in problems),
            f"{mean(r.score for r in group):,.0f}",
            f"{group[0].facts['total']:.2f}",
        )
        for name, group in sums.items()
    ]
    headings = ("method", *problems, "score", "parameters / backbone")
    return Table(headings, rows, "Accuracy in % by domain, and the score")
