"""Report section: which layers' adapters matter."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.formatting import file_name, signed
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, mean_score
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_DROP = 2.0
"""Points that the removal of one layer costs at most, according to Houlsby et al."""

MAJORITY_MARGIN = 3.0
"""Points above always predicting the majority class that still count as equal to it."""

SOURCE = "Houlsby et al. 2019, §3.6"

Case = tuple[str, str, str]
"""Network, problem, contender."""

Drops = dict[tuple[int, int], float]
"""Span of layers → change of the score in points when its adapters are removed."""


def ablation(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``ablation``; None without complete results."""
    complete = _complete([r for r in results if r.experiment == "ablation"])
    groups = group_by(complete, lambda r: (r.network, r.problem, r.contender))
    cases = {case: drops for case, group in groups.items() if (drops := _drops(group, "kept"))}
    if not cases:
        return None
    worst = {case: min(_single(drops).values()) for case, drops in cases.items()}
    network, problem, contender = min(worst, key=lambda case: worst[case])
    return Section(
        "ablation",
        "Which layers' adapters matter",
        f"Removing one layer's adapters changes the score by {signed(min(worst.values()))} points at worst "
        f"({contender} on {network}, {problem}); removing all of them, by {signed(min(map(_whole, cases.values())))}.",
        "The adapters of layers i to j are removed from a trained task, which is then measured on validation data "
        "without training again, as in Houlsby et al. 2019, Fig. 6. The diagonal is one layer, the upper right corner "
        "all layers. In the first panel the task keeps its norms; in the second, the norms of the removed layers are "
        "reverted to the backbone's.",
        tuple(_map(case, groups[case]) for case in cases),
        (_table(cases),),
        tuple(claim for case, drops in cases.items() for claim in _claims(case, groups[case], drops)),
    )


def _complete(results: Sequence[Result]) -> list[Result]:
    """Return the results of trained tasks that have all spans; an interrupted experiment lacks some."""
    tasks = group_by(results, lambda r: (r.network, r.problem, r.contender, r.seed, r.facts["norms"])).values()
    return [r for task in tasks if _is_complete(task) for r in task]


def _is_complete(results: Sequence[Result]) -> bool:
    spans = {(r.facts["first"], r.facts["last"]) for r in results}
    # older results lack the number of layers
    layers = max(r.facts.get("layers", 1 + (r.facts["last"] or 0)) for r in results)
    return spans == {(None, None), *((i, j) for i in range(layers) for j in range(i, layers))}


def _drops(results: Sequence[Result], norms: str) -> Drops:
    spans = group_by([r for r in results if r.facts["norms"] == norms], lambda r: (r.facts["first"], r.facts["last"]))
    untouched = spans.pop((None, None), None)
    return {span: mean_score(group) - mean_score(untouched) for span, group in spans.items()} if untouched else {}


def _single(drops: Drops) -> dict[int, float]:
    """Return layer → change when only this layer is removed."""
    return {first: change for (first, last), change in sorted(drops.items()) if first == last}


def _whole(drops: Drops) -> float:
    """Return the change when all layers are removed."""
    return drops[0, max(_single(drops))]


def _halves(drops: Drops) -> tuple[float, float]:
    """Return the mean change per removed layer, in the lower and in the upper half of the network."""
    changes = list(_single(drops).values())
    middle = len(changes) // 2
    return mean(changes[:middle] or changes), mean(changes[middle:])


def _map(case: Case, results: Sequence[Result]) -> Drawing:
    network, problem, contender = case
    panels = {norms: drops for norms in ("kept", "reverted") if (drops := _drops(results, norms))}
    layers = list(_single(panels["kept"]))

    def draw(look: Look) -> Figure:
        title = f"{network} on {problem}, {contender}: change of the score without the adapters of layers i to j"
        figure, all_axes = look.panels(len(panels), 3.0, title)
        matrices = [[[drops.get((i, j)) for j in layers] for i in layers] for drops in panels.values()]
        heatmaps(all_axes, look, matrices, [str(layer) for layer in layers])
        for axes, norms in zip(all_axes, panels, strict=True):
            axes.set_title(f"norms {norms}")
            axes.set_xlabel("last layer removed, j")
            axes.set_ylabel("first layer removed, i")
        return figure

    single = ", ".join(f"layer {i} {signed(change)}" for i, change in _single(panels["kept"]).items())
    alt = (
        f"Triangular heat map for {contender} on {network}, {problem}: change of the score in points when the adapters "
        f"of a span of layers are removed. One layer: {single}. All layers: {signed(_whole(panels['kept']))}."
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
    headings = ("network", "problem", "method", "worst layer", "lower half", "upper half", "all layers")
    title = "Change of the score in points, norms kept; halves of the network: mean per removed layer"
    return Table(headings, rows, title)


def _claims(case: Case, results: Sequence[Result], drops: Drops) -> list[Claim]:
    network, problem, contender = case
    where = f"{contender} on {network}, {problem}"
    seeds = dict(sorted(group_by(results, lambda r: r.seed).items()))
    by_seed = [each for task in seeds.values() if (each := _drops(task, "kept"))]
    single = _single(drops)
    layer = min(single, key=lambda layer: single[layer])
    worst = single[layer]
    claims = [
        Claim(
            f"Removing one layer's adapters costs at most {MAX_DROP:g} points",
            SOURCE,
            where,
            at_least([each[layer, layer] for each in by_seed], -MAX_DROP),
            f"{signed(worst)} points at worst",
            len(by_seed),
        )
    ]
    if results[0].modality == "text":
        lower, upper = _halves(drops)
        measured = f"mean per lower layer {signed(lower)} points, per upper layer {signed(upper)}"
        differences = [below - above for below, above in map(_halves, by_seed)]
        holds = at_least(differences)
        text = "Lower layers matter less than upper ones on text"
        claims.append(Claim(text, SOURCE, where, holds, measured, len(by_seed)))
    majority = 100 * results[0].facts["majority"]
    untouched = [r for r in results if r.facts["norms"] == "kept" and r.facts["first"] is None]
    remaining = mean_score(untouched) + _whole(drops)
    above = [mean_score([r for r in untouched if r.seed == seed]) for seed in sorted({r.seed for r in untouched})]
    margins = [majority + MAJORITY_MARGIN - score - _whole(d) for score, d in zip(above, by_seed, strict=True)]
    claims.append(
        Claim(
            f"Without any adapter the score drops to that of the majority class, within {MAJORITY_MARGIN:g} points",
            SOURCE,
            where,
            at_least(margins),
            f"{remaining:.1f} %; the majority class has {majority:.1f} %",
            len(by_seed),
        )
    )
    return claims
