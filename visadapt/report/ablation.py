"""Report section: which layers' adapters matter."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.claims import LOWER_LAYERS, MAJORITY, MAJORITY_MARGIN, MAX_DROP, SINGLE_LAYER
from visadapt.report.formatting import file_name, pluralize, signed
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, interval, mean_score
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        tuple(
            claim
            for network, group in group_by(complete, lambda r: r.network).items()
            if any(case[0] == network for case in cases)
            for claim in _claims(network, group)
        ),
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
        heatmaps(all_axes, look, matrices, [[str(layer) for layer in layers]] * len(matrices))
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


def _claims(network: str, results: Sequence[Result]) -> list[Claim]:
    """Test the claims on the trained tasks of a network, each a problem, a method and a seed."""
    worst, differences, margins, remaining = [], [], [], []
    lowers, uppers, majorities = [], [], []
    for group in group_by(results, lambda r: (r.problem, r.contender)).values():
        single = _single(_drops(group, "kept"))
        if not single:
            continue
        layer = min(single, key=lambda layer: single[layer])
        majority = 100 * group[0].facts["majority"]
        for task in group_by(group, lambda r: r.seed).values():
            drops = _drops(task, "kept")
            if not drops:
                continue
            worst.append(drops[layer, layer])
            lower, upper = _halves(drops)
            differences.append(lower - upper)
            lowers.append(lower)
            uppers.append(upper)
            untouched = [r for r in task if r.facts["norms"] == "kept" and r.facts["first"] is None]
            remaining.append(mean_score(untouched) + _whole(drops))
            margins.append(majority + MAJORITY_MARGIN - remaining[-1])
            majorities.append(majority)
    if not worst:
        return []
    count, modality = len(worst), results[0].modality
    single_measured = f"the worst layer costs {signed(mean(worst))} points, mean of {_tasks(count)}{_interval(worst)}"
    halves = f"mean per lower layer {signed(mean(lowers))} points, per upper layer {signed(mean(uppers))}"
    gap = mean(remaining) - mean(majorities)
    left = f"{mean(remaining):.1f} % without adapters, {signed(gap)} points from the majority class"
    claims = [SINGLE_LAYER.tested(network, at_least(worst, -MAX_DROP), single_measured, count, modality)]
    if modality == "text":
        claims.append(LOWER_LAYERS.tested(network, at_least(differences), halves, count, modality))
    claims.append(MAJORITY.tested(network, at_least(margins), left, count, modality))
    return claims


def _tasks(count: int) -> str:
    return pluralize(count, "trained task")


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, high = interval(values)
    return f", 95 % interval {signed(low)} to {signed(high)}"
