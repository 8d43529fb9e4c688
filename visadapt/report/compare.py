"""Report section: methods side by side, on every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from statistics import mean, quantiles
from typing import TYPE_CHECKING

from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.record import Result
from visadapt.report.formatting import file_name, join_words, mean_and_std, pluralize, signed, two_digits
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    at_least,
    gaps_to_full,
    group_by,
    interval,
    mean_score,
    paired_differences,
    percent_trained,
)
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TRAINED = 3.6
"""Trained parameters of Houlsby's adapters on GLUE in % of the backbone (Table 1)."""

MAX_GAP = 0.4
"""Points by which they are below full fine-tuning there."""

MAX_LOSS = 1.0
"""Points below full fine-tuning that the 95 % interval must exclude."""

LINEAR = " activation=None"
"""Suffix of the name of a linear bottleneck."""


def compare(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``compare``; None without test results."""
    compared = [r for r in results if r.experiment == "compare"]
    networks = group_by([r for r in compared if r.split == "test"], lambda r: r.network)
    if not networks:
        return None
    gaps = {network: gaps_to_full(group) for network, group in networks.items()}
    best = []
    for network, group in networks.items():
        partial = _partial(group)
        adapters = {name: gap for name, gap in gaps[network].items() if is_adapter(name) and name not in partial}
        if adapters:
            name = max(adapters, key=lambda name: adapters[name])
            trained = two_digits(max(percent_trained(r) for r in group if r.contender == name))
            best.append(f"{name} at {signed(adapters[name])} points with {trained} % on {network}")
    modalities = group_by(compared, lambda r: r.modality)
    return Section(
        "compare",
        "Methods side by side",
        f"Best adapters relative to full fine-tuning, mean over problems: {join_words(best)}."
        if best
        else f"{len({r.contender for r in compared})} methods, none of which can be compared with full fine-tuning.",
        "Each method at its best learning rate on validation data, measured on test data. In the figures a small mark "
        "is one problem and a large mark the mean over problems, in points above or below full fine-tuning of the same "
        "backbone; circles are adapters, squares train parameters of the network itself. Next to each name is the "
        "percentage of the backbone's parameters that it trains, without heads, and the number of problems if these "
        "are not all. The tables show mean ± standard deviation over seeds.",
        tuple(_dots(network, group, gaps[network]) for network, group in networks.items() if gaps[network]),
        tuple(_table(network, group) for network, group in networks.items()),
        (
            *(claim for modality, group in modalities.items() if (claim := _near_full(modality, group))),
            *(claim for network, group in networks.items() if (claim := _nonlinear(network, group))),
        ),
    )


def _partial(results: Sequence[Result]) -> dict[str, str]:
    """Return contender → number of its problems, such as `` (1 problem)``, for those not run on all problems."""
    total = len({r.problem for r in results})
    counts = {name: len({r.problem for r in runs}) for name, runs in group_by(results, lambda r: r.contender).items()}
    return {name: f" ({pluralize(count, 'problem')})" for name, count in counts.items() if count < total}


def _dots(network: str, results: Sequence[Result], gaps: dict[str, float]) -> Drawing:
    names = sorted(gaps, key=lambda name: gaps[name])
    problems = [group_by(group, lambda r: r.contender) for group in group_by(results, lambda r: r.problem).values()]
    partial = _partial(results)
    trained = {r.contender: two_digits(percent_trained(r)) for r in results}

    def draw(look: Look) -> Figure:
        title = f"{network}: points above or below full fine-tuning, per problem and mean"
        figure, (axes,) = look.panels(1, 0.7 + 0.27 * len(names), title)
        marks = {name: _per_problem(problems, name) for name in names}
        edge = _edge([value for values in marks.values() for value in values])
        for row, (name, values) in enumerate(marks.items()):
            style = {key: look.series(0 if is_adapter(name) else 1)[key] for key in ("color", "marker")}
            inside = [value for value in values if value >= edge]
            axes.plot(inside, [row] * len(inside), markersize=3.5, alpha=0.6, **{**style, "linestyle": ""})
            axes.plot(max(gaps[name], edge), row, markersize=8, **{**style, **_off_scale(gaps[name], edge)})
            if outside := [signed(value) for value in values if value < edge]:
                axes.annotate(join_words(outside), (edge, row), (6, 5), textcoords="offset points", fontsize=6.5)
        axes.set_yticks(range(len(names)), [f"{name}  {trained[name]} %{partial.get(name, '')}" for name in names])
        axes.axvline(0, color=look.ink, linewidth=0.8)
        axes.grid(axis="x")
        axes.margins(y=0.06)
        off_scale = " (off the scale: as numbers)" if edge > -inf else ""
        axes.set_xlabel(f"points relative to full fine-tuning{off_scale}")
        return figure

    values = "; ".join(f"{name} {signed(gaps[name])}{partial.get(name, '')}" for name in reversed(names))
    problem_count = pluralize(len(problems), "problem")
    alt = f"Dot plot for {network}, points relative to full fine-tuning, mean over {problem_count}: {values}."
    return Drawing(file_name("compare", network), alt, draw)


def _per_problem(problems: Sequence[Mapping[str, Sequence[Result]]], name: str) -> list[float]:
    """Return the points of a contender relative to full fine-tuning, on each problem that both were run on."""
    shared = [runs for runs in problems if name in runs and FULL in runs]
    return [mean_score(runs[name]) - mean_score(runs[FULL]) for runs in shared]


def _edge(values: Sequence[float]) -> float:
    """Return the left end of the scale: three interquartile ranges below the lower quartile, or −∞ if none is below."""
    if len(values) < 2:
        return -inf
    lower, _, upper = quantiles(values, n=4)
    edge = lower - 3 * (upper - lower)
    return edge if min(values) < edge else -inf


def _off_scale(value: float, edge: float) -> dict[str, str]:
    return {"marker": "<"} if value < edge else {}


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = group_by(results, lambda r: r.problem)
    several = len(problems) > 1
    rows = []
    for name, runs in group_by(results, lambda r: r.contender).items():
        by_problem = group_by(runs, lambda r: r.problem)
        overall = f"{mean(map(mean_score, by_problem.values())):.1f}" if len(by_problem) == len(problems) else "–"
        rows.append(
            (
                name,
                *(mean_and_std(by_problem.get(problem, [])) for problem in problems),
                *((overall,) if several else ()),
                f"{runs[0].trained:,}",
                f"{percent_trained(runs[0]):.2f} %",
                f"{mean(r.seconds for r in runs):.0f}",
                f"{runs[0].bytes / 1e6:.2f} MB",
            )
        )
    scores = (*problems, "mean") if several else tuple(problems)
    headings = ("method", *scores, "trained", "of backbone", "seconds", "file")
    others = [f"; {p}: {rs[0].metric} × 100" for p, rs in problems.items() if rs[0].metric != "accuracy"]
    return Table(headings, rows, f"{network}: accuracy in %{''.join(others)}")


def _near_full(modality: str, results: Sequence[Result]) -> Claim | None:
    """Test the adapter, one per modality, that is best on validation data against full fine-tuning."""
    tests = [r for r in results if r.split == "test"]
    gaps = gaps_to_full(tests)
    cost = {name: max(map(percent_trained, group)) for name, group in group_by(tests, lambda r: r.contender).items()}
    problems = {(r.network, r.problem) for r in tests}
    validated = {}
    for name, group in group_by([r for r in results if r.split == "validation"], lambda r: r.contender).items():
        best = {
            problem: _at_best_rate(runs) for problem, runs in group_by(group, lambda r: (r.network, r.problem)).items()
        }
        if is_adapter(name) and name in gaps and set(best) == problems and cost[name] <= MAX_TRAINED:
            validated[name] = mean(best.values())
    if not validated:
        return None
    chosen = max(validated, key=lambda name: validated[name])
    problem_count = pluralize(len(problems), "problem")
    runs = [r for r in tests if r.contender == chosen]
    full = [r for r in tests if r.contender == FULL]
    differences = paired_differences(runs, full)
    return Claim(
        f"Adapters are within {MAX_GAP} points of full fine-tuning at ≤ {MAX_TRAINED} % trained parameters, with one "
        f"method and size chosen on validation data, and surely within {MAX_LOSS:g} point",
        "Houlsby et al. 2019, Table 1",
        modality,
        _reaches(differences),
        f"{chosen}: {signed(gaps[chosen])} points at {two_digits(cost[chosen])} %, mean of {problem_count}"
        f"{_interval(differences)}",
        len(runs) + len(full),
    )


def _reaches(differences: Sequence[float]) -> bool | None:
    """Whether the mean is within `MAX_GAP` of zero and its interval above −`MAX_LOSS`; not if all of it is below."""
    if len(differences) < 2:
        return None
    low, high = interval(differences)
    if mean(differences) >= -MAX_GAP and low > -MAX_LOSS:
        return True
    return False if high < -MAX_GAP else None


def _interval(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return ""
    low, high = interval(differences)
    return f", 95 % interval {signed(low)} to {signed(high)}"


def _at_best_rate(results: Sequence[Result]) -> float:
    """Return the mean score over seeds at the rate and epochs with the most seeds; among equals, the best."""
    choices = group_by(results, lambda r: (r.lr, r.epochs, r.facts.get("variant")))
    return max((len(runs), mean(r.standing for r in runs)) for runs in choices.values())[1]


def _nonlinear(network: str, results: Sequence[Result]) -> Claim | None:
    """Compare bottlenecks on feature maps with the same ones without an activation between the two 1×1 convolutions."""
    contenders = {
        name: group_by(runs, lambda r: (r.problem, r.seed))
        for name, runs in group_by(results, lambda r: r.contender).items()
    }
    gaps = {}
    for name, runs in contenders.items():
        linear = contenders.get(f"{name}{LINEAR}", {})
        if pairs := [100 * (runs[pair][0].score - linear[pair][0].score) for pair in runs if pair in linear]:
            gaps[name] = pairs
    if not gaps or results[0].modality != "image":
        return None
    measured = [
        f"{name}: {signed(mean(pairs))} points at equal parameters, mean of {pluralize(len(pairs), 'pair')}; "
        f"better in {sum(gap > 0 for gap in pairs)}"
        for name, pairs in gaps.items()
    ]
    differences = [gap for pairs in gaps.values() for gap in pairs]
    return Claim(
        "A nonlinear bottleneck is better than a linear one of the same size",
        "Houlsby et al. 2019, §2, and Rebuffi et al. 2018",
        network,
        at_least(differences),
        f"{join_words(measured)}{_interval(differences)}",
        2 * len(differences),
    )
