"""Size against score."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.optional import require
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    FULL,
    against_full,
    amount,
    average,
    by_chance,
    file_name,
    grouped,
    share,
    signed,
    told,
)
from visadapt.report.style import Drawing, Look, plain_ticks
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAT = range(8, 257)
"""Widths that Houlsby et al. find to be equally good."""

WITHIN = 1.0
"""Points between the best and the worst of them that count as flat here; the paper's are 0.5 apart."""

LINES = {"m": "adapters", "n": "top layers"}
"""What the facts of a result say the size of."""


def tradeoff(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``tradeoff``."""
    own = [r for r in results if r.experiment == "tradeoff" and r.split == "test"]
    networks = {name: group for name, group in grouped(own, lambda r: r.network).items() if _points(group, "m")}
    if not networks:
        return None
    seen = []
    for name, group in networks.items():
        gap, m = max((mean(gaps), m) for m, gaps in _points(group, "m").items())
        seen.append(f"{signed(gap)} points on {name} (m = {m})")
    return Section(
        "tradeoff",
        "Size against score",
        f"At their best width adapters are, against full fine-tuning, at {' and '.join(seen)}.",
        "Adapters of growing width m against fine-tuning the top n layers, the norms alone and everything, as in "
        "Houlsby et al. 2019, Fig. 3. A line is the median over problems and seeds of the points against full "
        "fine-tuning of the same problem; its band reaches from the 20th to the 80th percentile.",
        tuple(_curves(name, group) for name, group in networks.items()),
        tuple(_table(name, group) for name, group in networks.items()),
        tuple(c for name, group in networks.items() for c in (_flat(name, group), _fewer(name, group)) if c),
    )


def _points(results: Sequence[Result], fact: str) -> dict[int, list[float]]:
    """Size → points against full fine-tuning, one a problem and seed, for what has this fact."""
    found: dict[int, list[float]] = {}
    for group in grouped(results, lambda r: r.problem).values():
        whole = [r for r in group if r.contender == FULL]
        for r in group if whole else ():
            if fact in r.facts:
                found.setdefault(r.facts[fact], []).append(100 * r.score - average(whole))
    return dict(sorted(found.items()))


def _share(results: Sequence[Result], fact: str, size: int) -> float:
    return mean(share(r) for r in results if r.facts.get(fact) == size)


def _curves(network: str, results: Sequence[Result]) -> Drawing:
    lines = {fact: points for fact in LINES if (points := _points(results, fact))}
    norms = [r for r in results if r.contender == "norms only"]

    def draw(look: Look) -> Figure:
        np = require("numpy", "a figure", "visadapt[plots]")
        figure, (axes,) = look.panels(1, 3.6, f"{network}: what a score costs in trained parameters")
        for number, (fact, points) in enumerate(lines.items()):
            x = [_share(results, fact, size) for size in points]
            low, middle, high = (np.array([np.percentile(gaps, q) for gaps in points.values()]) for q in (20, 50, 80))
            axes.fill_between(x, low, high, color=look.colour(number), alpha=0.2, linewidth=0)
            axes.plot(x, middle, label=f"{LINES[fact]}, {fact} at the marks", **look.series(number))
            for size, *place in zip(points, x, middle, strict=True):
                axes.annotate(str(size), (place[0], place[1]), xytext=(0, -12), textcoords="offset points", ha="center",
                              fontsize=7.5, color=look.colour(number))  # fmt: skip
        if norms:
            style = {**look.series(2), "linestyle": ""}
            axes.plot([mean(map(share, norms))], [against_full(results)["norms only"]], label="norms only", **style)
        axes.axhline(0, color=look.ink, linewidth=0.8)
        axes.margins(y=0.08)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_xlabel("trained parameters in % of the backbone")
        axes.set_ylabel("points against full fine-tuning")
        look.legend(figure)
        return figure

    words = "; ".join(
        f"{LINES[fact]}: " + ", ".join(f"{signed(mean(gaps))} at {fact} = {size}" for size, gaps in points.items())
        for fact, points in lines.items()
    )
    alt = f"Curves of points against full fine-tuning on {network}, by trained parameters. {words}."
    return Drawing(file_name("tradeoff", network), alt, draw)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = list(dict.fromkeys(r.problem for r in results))
    contenders = sorted(grouped(results, lambda r: r.contender).items(), key=lambda item: item[1][0].fraction)
    rows = [
        (name, *(told([r for r in own if r.problem == problem]) for problem in problems), f"{share(own[0]):.2f} %")
        for name, own in contenders
    ]
    return Table(("method", *problems, "of backbone"), rows, f"{network}: score in %")


def _flat(network: str, results: Sequence[Result]) -> Claim | None:
    means = {m: mean(gaps) for m, gaps in _points(results, "m").items() if m in FLAT}
    if len(means) < 2:
        return None
    best, worst = max(means, key=lambda m: means[m]), min(means, key=lambda m: means[m])
    gap = means[best] - means[worst]
    groups = grouped([r for r in results if r.facts.get("m") in means], lambda r: (r.problem, r.facts["m"])).values()
    return Claim(
        f"The score hardly depends on the width from m = 8 to 256: means within {WITHIN:g} point",
        "Houlsby et al. 2019, §3.6",
        network,
        gap <= WITHIN,
        f"{gap:.1f} points between m = {best} and m = {worst}, of {len(means)} widths{by_chance(groups)}",
    )


def _fewer(network: str, results: Sequence[Result]) -> Claim | None:
    adapters, layers = _points(results, "m"), _points(results, "n")
    if not adapters or not layers:
        return None
    n = max(layers, key=lambda n: mean(layers[n]))
    best, cost = mean(layers[n]), _share(results, "n", n)
    least = min((_share(results, "m", m) for m, gaps in adapters.items() if mean(gaps) >= best), default=None)
    reached = "no width of adapters reaches that" if least is None else f"adapters reach that at {amount(least)} %"
    return Claim(
        "Adapters reach the best score of top layers with fewer parameters",
        "Houlsby et al. 2019, Fig. 3",
        network,
        least is not None and least < cost,
        f"top {n}: {signed(best)} points at {amount(cost)} %; {reached}",
    )
