"""Report section: trained parameters against score."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import TYPE_CHECKING

from visadapt.experiments.catalogue import FULL
from visadapt.experiments.record import Result
from visadapt.optional import require
from visadapt.report.claims import FEWER, FLAT, MAX_RANGE
from visadapt.report.clipping import clipped_line, window
from visadapt.report.formatting import file_name, join_words, mean_and_std, seed_spread, signed, two_digits
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    at_least,
    gaps_to_full,
    group_by,
    mean_score,
    paired_differences,
    percent_trained,
)
from visadapt.report.style import Drawing, Look, plain_ticks
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAT_WIDTHS = range(8, 257)
"""Widths that Houlsby et al. find to be equally good."""

LINES = {"m": "adapters", "n": "top layers"}
"""Fact with the size of a contender → name of its line in the figures."""


def tradeoff(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``tradeoff``; None without adapters and full fine-tuning."""
    tests = [r for r in results if r.experiment == "tradeoff" and r.split == "test"]
    networks = {name: group for name, group in group_by(tests, lambda r: r.network).items() if _points(group, "m")}
    if not networks:
        return None
    best = []
    for name, group in networks.items():
        gap, m = max((mean(gaps), m) for m, gaps in _points(group, "m").items())
        best.append(f"{signed(gap)} points on {name} (m = {m})")
    return Section(
        "tradeoff",
        "Trained parameters against score",
        f"Adapters of the best width relative to full fine-tuning: {join_words(best)}.",
        "Adapters of increasing width m, compared with fine-tuning the top n layers, the norms alone and all weights, "
        "as in Houlsby et al. 2019, Fig. 3. Lines are medians over problems and seeds of the points relative to full "
        "fine-tuning on the same problem, bands reach from the 20th to the 80th percentile.",
        tuple(_curves(name, group) for name, group in networks.items()),
        tuple(_table(name, group) for name, group in networks.items()),
        tuple(c for name, group in networks.items() for c in (_flat(name, group), _fewer(name, group)) if c),
    )


def _points(results: Sequence[Result], fact: str) -> dict[int, list[float]]:
    """Return size → points relative to full fine-tuning, one per problem and seed, of results with this fact."""
    points: dict[int, list[float]] = {}
    for group in group_by(results, lambda r: r.problem).values():
        full = [r for r in group if r.contender == FULL]
        for r in group if full else ():
            if fact in r.facts:
                points.setdefault(r.facts[fact], []).append(100 * r.score - mean_score(full))
    return dict(sorted(points.items()))


def _share(results: Sequence[Result], fact: str, size: int) -> float:
    return mean(percent_trained(r) for r in results if r.facts.get(fact) == size)


def _curves(network: str, results: Sequence[Result]) -> Drawing:
    lines = {fact: points for fact in LINES if (points := _points(results, fact))}
    norms = [r for r in results if r.contender == "norms only"]
    medians = [median(gaps) for points in lines.values() for gaps in points.values()]
    visible = window(medians)

    def draw(look: Look) -> Figure:
        np = require("numpy", "a figure", "visadapt[plots]")
        figure, (axes,) = look.panels(1, 3.6, f"{network}: score by trained parameters")
        for number, (fact, points) in enumerate(lines.items()):
            x = [_share(results, fact, size) for size in points]
            low, middle, high = (
                [visible.clip(np.percentile(gaps, q)) for gaps in points.values()] for q in (20, 50, 80)
            )
            axes.fill_between(x, low, high, color=look.colour(number), alpha=0.2, linewidth=0)
            label = f"{LINES[fact]}, {fact} at the marks"
            clipped_line(axes, visible, x, list(map(median, points.values())), label=label, **look.series(number))
            for size, *point in zip(points, x, middle, strict=True):
                axes.annotate(str(size), (point[0], point[1]), xytext=(0, -13), textcoords="offset points", ha="center",
                              fontsize=7.5, color=look.colour(number))  # fmt: skip
        if norms:
            style = {**look.series(2), "linestyle": ""}
            place, value = mean(map(percent_trained, norms)), gaps_to_full(results)["norms only"]
            clipped_line(axes, visible, [place], [value], label="norms only", **style)
        axes.axhline(0, color=look.ink, linewidth=0.8)
        axes.margins(y=0.08)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, between=True)
        axes.set_xlabel("trained parameters in % of the backbone")
        axes.set_ylabel(visible.label("points relative to full fine-tuning"))
        look.legend(figure)
        return figure

    values = "; ".join(
        f"{LINES[fact]}: " + ", ".join(f"{signed(mean(gaps))} at {fact} = {size}" for size, gaps in points.items())
        for fact, points in lines.items()
    )
    alt = f"Curves of points relative to full fine-tuning on {network}, by trained parameters. {values}."
    return Drawing(file_name("tradeoff", network), alt, draw)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = list(dict.fromkeys(r.problem for r in results))
    contenders = sorted(group_by(results, lambda r: r.contender).items(), key=lambda item: item[1][0].fraction)
    rows = [
        (
            name,
            *(mean_and_std([r for r in runs if r.problem == problem]) for problem in problems),
            f"{percent_trained(runs[0]):.2f} %",
        )
        for name, runs in contenders
    ]
    return Table(("method", *problems, "of backbone"), rows, f"{network}: score in %")


def _flat(network: str, results: Sequence[Result]) -> Claim | None:
    means = {m: mean(gaps) for m, gaps in _points(results, "m").items() if m in FLAT_WIDTHS}
    if len(means) < 2:
        return None
    best, worst = max(means, key=lambda m: means[m]), min(means, key=lambda m: means[m])
    gap = means[best] - means[worst]
    groups = group_by([r for r in results if r.facts.get("m") in means], lambda r: (r.problem, r.facts["m"])).values()
    return FLAT.tested(
        network,
        at_least([MAX_RANGE - each for each in _paired(results, ("m", best), ("m", worst))]),
        f"{gap:.1f} points between m = {best} and m = {worst}, of {len(means)} widths{seed_spread(groups)}",
        sum(map(len, groups)),
        results[0].modality,
    )


def _paired(results: Sequence[Result], one: tuple[str, int], other: tuple[str, int]) -> list[float]:
    """Return the differences in points between contenders of two sizes, paired by problem and seed."""
    first, second = ([r for r in results if r.facts.get(fact) == size] for fact, size in (one, other))
    return paired_differences(first, second)


def _fewer(network: str, results: Sequence[Result]) -> Claim | None:
    adapters, layers = _points(results, "m"), _points(results, "n")
    if not adapters or not layers:
        return None
    n = max(layers, key=lambda n: mean(layers[n]))
    best, cost = mean(layers[n]), _share(results, "n", n)
    least = min((_share(results, "m", m) for m, gaps in adapters.items() if mean(gaps) >= best), default=None)
    reached = "no adapter reaches that score" if least is None else f"adapters reach it at {two_digits(least)} %"
    smaller = {m: mean(gaps) for m, gaps in adapters.items() if _share(results, "m", m) < cost}
    m = max(smaller, key=lambda m: smaller[m], default=None)
    differences = [] if m is None else _paired(results, ("m", m), ("n", n))
    return FEWER.tested(
        network,
        at_least(differences),
        f"top {n}: {signed(best)} points at {two_digits(cost)} %; {reached}",
        2 * len(differences),
        results[0].modality,
    )
