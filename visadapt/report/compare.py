"""Methods side by side, on every problem."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    FULL,
    against_full,
    amount,
    average,
    counted,
    file_name,
    grouped,
    is_adapter,
    listed,
    share,
    signed,
    told,
)
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALLOWED = 3.6
"""Trained parameters in % of the backbone that Houlsby's adapters have on GLUE (Table 1)."""

CLOSE = 0.4
"""Points by which they are below full fine-tuning there."""

LINEAR = " activation=None"
"""How the name of a bottleneck ends that is linear."""


def compare(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``compare``."""
    own = [r for r in results if r.experiment == "compare"]
    networks = grouped([r for r in own if r.split == "test"], lambda r: r.network)
    if not networks:
        return None
    gaps = {network: against_full(group) for network, group in networks.items()}
    best = []
    for network, group in networks.items():
        partly = _partly(group)
        adapters = {name: gap for name, gap in gaps[network].items() if is_adapter(name) and name not in partly}
        if adapters:
            name = max(adapters, key=lambda name: adapters[name])
            trained = amount(max(share(r) for r in group if r.contender == name))
            best.append(f"{name} at {signed(adapters[name])} points with {trained} % on {network}")
    modalities = grouped(own, lambda r: r.modality)
    return Section(
        "compare",
        "Methods side by side",
        f"Best against full fine-tuning, in the mean over problems: {listed(best)}."
        if best
        else f"{len({r.contender for r in own})} methods, of which none can be set against full fine-tuning.",
        "Each method at the learning rate that validation data chose for it, on test data. In the figure a small mark "
        "is a problem and a large one the mean over problems, in points above or below full fine-tuning of the same "
        "backbone; circles are adapters, squares train parameters that the network has. The share of the backbone that "
        "is trained, heads apart, stands beside the name, and the number of problems where these are not all. Tables "
        "give the mean ± the standard deviation over seeds.",
        tuple(_dots(network, group, gaps[network]) for network, group in networks.items() if gaps[network]),
        tuple(_table(network, group) for network, group in networks.items()),
        (
            *(claim for modality, group in modalities.items() if (claim := _bar(modality, group))),
            *(claim for network, group in networks.items() if (claim := _nonlinear(network, group))),
        ),
    )


def _partly(results: Sequence[Result]) -> dict[str, str]:
    """Contenders that were not run on all problems → on how many: `` (1 problem)``."""
    every = len({r.problem for r in results})
    counts = {name: len({r.problem for r in own}) for name, own in grouped(results, lambda r: r.contender).items()}
    return {name: f" ({counted(count, 'problem')})" for name, count in counts.items() if count < every}


def _dots(network: str, results: Sequence[Result], gaps: dict[str, float]) -> Drawing:
    names = sorted(gaps, key=lambda name: gaps[name])
    problems = [grouped(group, lambda r: r.contender) for group in grouped(results, lambda r: r.problem).values()]
    partly = _partly(results)
    trained = {r.contender: amount(share(r)) for r in results}

    def draw(look: Look) -> Figure:
        title = f"{network}: points above or below full fine-tuning, problem by problem and in the mean"
        figure, (axes,) = look.panels(1, 0.7 + 0.27 * len(names), title)
        for row, name in enumerate(names):
            style = {key: look.series(0 if is_adapter(name) else 1)[key] for key in ("color", "marker")}
            singles = [average(by[name]) - average(by[FULL]) for by in problems if name in by and FULL in by]
            axes.plot(singles, [row] * len(singles), markersize=3.5, alpha=0.6, **{**style, "linestyle": ""})
            axes.plot(gaps[name], row, markersize=8, **style)
        axes.set_yticks(range(len(names)), [f"{name}  {trained[name]} %{partly.get(name, '')}" for name in names])
        axes.axvline(0, color=look.ink, linewidth=0.8)
        axes.grid(axis="x")
        axes.margins(y=0.06)
        axes.set_xlabel("points against full fine-tuning")
        return figure

    words = "; ".join(f"{name} {signed(gaps[name])}{partly.get(name, '')}" for name in reversed(names))
    over = counted(len(problems), "problem")
    alt = f"Dot plot for {network}, points against full fine-tuning in the mean over {over}: {words}."
    return Drawing(file_name("compare", network), alt, draw)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = grouped(results, lambda r: r.problem)
    several = len(problems) > 1
    rows = []
    for name, own in grouped(results, lambda r: r.contender).items():
        by = grouped(own, lambda r: r.problem)
        over_all = f"{mean(map(average, by.values())):.1f}" if len(by) == len(problems) else "–"
        rows.append(
            (
                name,
                *(told(by.get(problem, [])) for problem in problems),
                *((over_all,) if several else ()),
                f"{own[0].trained:,}",
                f"{share(own[0]):.2f} %",
                f"{mean(r.seconds for r in own):.0f}",
                f"{own[0].bytes / 1e6:.2f} MB",
            )
        )
    scores = (*problems, "mean") if several else tuple(problems)
    headings = ("method", *scores, "trained", "of backbone", "seconds", "file")
    others = [f"; {p} is {rs[0].metric} × 100" for p, rs in problems.items() if rs[0].metric != "accuracy"]
    return Table(headings, rows, f"{network}: accuracy in %{''.join(others)}")


def _bar(modality: str, results: Sequence[Result]) -> Claim | None:
    """The adapter that validation data prefers, one for all problems of a modality, against full fine-tuning."""
    tests = [r for r in results if r.split == "test"]
    gaps = against_full(tests)
    cost = {name: max(map(share, group)) for name, group in grouped(tests, lambda r: r.contender).items()}
    problems = {(r.network, r.problem) for r in tests}
    validated = {}
    for name, group in grouped([r for r in results if r.split == "validation"], lambda r: r.contender).items():
        best = {at: _at_best_rate(own) for at, own in grouped(group, lambda r: (r.network, r.problem)).items()}
        if is_adapter(name) and name in gaps and set(best) == problems and cost[name] <= ALLOWED:
            validated[name] = mean(best.values())
    if not validated:
        return None
    chosen = max(validated, key=lambda name: validated[name])
    over = counted(len(problems), "problem")
    return Claim(
        f"Adapters are within {CLOSE} points of full fine-tuning at ≤ {ALLOWED} % trained parameters, one method and "
        "size, chosen on validation data",
        "Houlsby et al. 2019, Table 1",
        modality,
        gaps[chosen] >= -CLOSE,
        f"{chosen}: {signed(gaps[chosen])} points at {amount(cost[chosen])} %, mean of {over}",
    )


def _at_best_rate(results: Sequence[Result]) -> float:
    """Mean score over seeds, at the learning rate that most of them were trained at, and of these at the best."""
    return max((len(own), mean(r.standing for r in own)) for own in grouped(results, lambda r: r.lr).values())[1]


def _nonlinear(network: str, results: Sequence[Result]) -> Claim | None:
    """Bottlenecks on feature maps against the same without what is between their two 1×1 convolutions."""
    by = {
        name: grouped(own, lambda r: (r.problem, r.seed))
        for name, own in grouped(results, lambda r: r.contender).items()
    }
    gaps = {}
    for name, own in by.items():
        linear = by.get(f"{name}{LINEAR}", {})
        if shared := [100 * (own[at][0].score - linear[at][0].score) for at in own if at in linear]:
            gaps[name] = shared
    if not gaps or results[0].modality != "image":
        return None
    said = [
        f"{name}: {signed(mean(each))} points at equal parameters, in the mean of {counted(len(each), 'pair')}, "
        f"of which it is better in {sum(gap > 0 for gap in each)}"
        for name, each in gaps.items()
    ]
    better = mean(gap for each in gaps.values() for gap in each) > 0
    return Claim(
        "A nonlinear bottleneck is better than a linear one of its size",
        "Houlsby et al. 2019, §2, against Rebuffi et al. 2018",
        network,
        better,
        listed(said),
    )
