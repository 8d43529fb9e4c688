"""Which layers' adapters matter."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import average, file_name, grouped, signed
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 2.0
"""Points that the removal of one layer costs at most, by Houlsby et al."""

NEAR = 3.0
"""Points above naming the majority class always that still count as no better."""

SOURCE = "Houlsby et al. 2019, §3.6"

Case = tuple[str, str, str]
"""Network, problem, contender."""

Drops = dict[tuple[int, int], float]
"""Span of layers → points by which the score changes when its adapters are removed."""


def ablation(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``ablation``."""
    own = _complete([r for r in results if r.experiment == "ablation"])
    groups = grouped(own, lambda r: (r.network, r.problem, r.contender))
    cases = {case: drops for case, group in groups.items() if (drops := _drops(group, "kept"))}
    if not cases:
        return None
    worst = {case: min(_single(drops).values()) for case, drops in cases.items()}
    network, problem, contender = min(worst, key=lambda case: worst[case])
    return Section(
        "ablation",
        "Which layers' adapters matter",
        f"Without the adapters of a single layer the score changes by {signed(min(worst.values()))} points at worst "
        f"({contender} on {network}, {problem}); without any, by {signed(min(map(_whole, cases.values())))}.",
        "From a trained task the adapters of layers i to j are removed, and the rest is measured on validation data "
        "without training again, as in Houlsby et al. 2019, Fig. 6: the diagonal is one layer, the upper right corner "
        "all of them. First the task's norms stay, then those of the removed layers go back to the backbone's.",
        tuple(_map(case, groups[case]) for case in cases),
        (_table(cases),),
        tuple(claim for case, drops in cases.items() for claim in _claims(case, groups[case], drops)),
    )


def _complete(results: Sequence[Result]) -> list[Result]:
    """Without those trained tasks of which not every span was taken out yet: an experiment was killed there."""
    tasks = grouped(results, lambda r: (r.network, r.problem, r.contender, r.seed, r.facts["norms"])).values()
    return [r for own in tasks if _is_complete(own) for r in own]


def _is_complete(results: Sequence[Result]) -> bool:
    spans = {(r.facts["first"], r.facts["last"]) for r in results}
    # an older result does not say how many layers there are
    layers = max(r.facts.get("layers", 1 + (r.facts["last"] or 0)) for r in results)
    return spans == {(None, None), *((i, j) for i in range(layers) for j in range(i, layers))}


def _drops(results: Sequence[Result], norms: str) -> Drops:
    own = [r for r in results if r.facts["norms"] == norms]
    spans = grouped(own, lambda r: (r.facts["first"], r.facts["last"]))
    untouched = spans.pop((None, None), None)
    return {span: average(group) - average(untouched) for span, group in spans.items()} if untouched else {}


def _single(drops: Drops) -> dict[int, float]:
    """Layer → change when it alone is removed."""
    return {first: change for (first, last), change in sorted(drops.items()) if first == last}


def _whole(drops: Drops) -> float:
    """The change when all layers are removed."""
    return drops[0, max(_single(drops))]


def _halves(drops: Drops) -> tuple[float, float]:
    """Mean change by one layer's removal, in the lower and in the upper half of the network."""
    changes = list(_single(drops).values())
    middle = len(changes) // 2
    return mean(changes[:middle] or changes), mean(changes[middle:])


def _map(case: Case, results: Sequence[Result]) -> Drawing:
    network, problem, contender = case
    panels = {norms: drops for norms in ("kept", "reverted") if (drops := _drops(results, norms))}
    layers = list(_single(panels["kept"]))

    def draw(look: Look) -> Figure:
        title = f"{network} on {problem}, {contender}: points lost without the adapters of layers i to j"
        figure, drawn = look.panels(len(panels), 3.0, title)
        matrices = [[[drops.get((i, j)) for j in layers] for i in layers] for drops in panels.values()]
        heatmaps(drawn, look, matrices, [str(layer) for layer in layers])
        for axes, norms in zip(drawn, panels, strict=True):
            axes.set_title(f"norms {norms}")
            axes.set_xlabel("last layer removed, j")
            axes.set_ylabel("first layer removed, i")
        return figure

    single = ", ".join(f"layer {i} {signed(change)}" for i, change in _single(panels["kept"]).items())
    alt = (
        f"Triangular heat map for {contender} on {network}, {problem}: points by which the score changes when the "
        f"adapters of a span of layers are removed. One layer: {single}. All layers: {signed(_whole(panels['kept']))}."
    )
    return Drawing(file_name("ablation", *case), alt, draw)


def _table(cases: dict[Case, Drops]) -> Table:
    rows = []
    for case, drops in cases.items():
        single, (lower, upper) = _single(drops), _halves(drops)
        worst = min(single, key=lambda layer: single[layer])
        rows.append(
            (*case, f"{signed(single[worst])} (layer {worst})", signed(lower), signed(upper), signed(_whole(drops)))
        )
    headings = ("network", "problem", "method", "worst layer", "a lower layer", "an upper layer", "all layers")
    return Table(headings, rows, "Points by which the score changes, norms kept; lower and upper layers in the mean")


def _claims(case: Case, results: Sequence[Result], drops: Drops) -> list[Claim]:
    network, problem, contender = case
    where = f"{contender} on {network}, {problem}"
    worst = min(_single(drops).values())
    claims = [
        Claim(
            f"Removing one layer's adapters costs at most {MOST:g} points",
            SOURCE,
            where,
            worst >= -MOST,
            f"{signed(worst)} points at worst",
        )
    ]
    if results[0].modality == "text":
        lower, upper = _halves(drops)
        measured = f"a lower layer {signed(lower)} points, an upper one {signed(upper)}, in the mean"
        claims.append(Claim("Lower layers matter less than upper ones on text", SOURCE, where, lower > upper, measured))
    majority = 100 * results[0].facts["majority"]
    left = average([r for r in results if r.facts["norms"] == "kept" and r.facts["first"] is None]) + _whole(drops)
    claims.append(
        Claim(
            f"Without any adapter the task falls to the majority class, within {NEAR:g} points",
            SOURCE,
            where,
            left <= majority + NEAR,
            f"{left:.1f} % are left; the majority class has {majority:.1f} %",
        )
    )
    return claims
