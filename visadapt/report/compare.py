"""Report section: methods side by side, on every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.record import Result
from visadapt.report.advice import validated
from visadapt.report.claims import MAX_GAP, MAX_LOSS, MAX_TRAINED, NEAR_FULL, NONLINEAR
from visadapt.report.clipping import window
from visadapt.report.formatting import file_name, join_words, mean_and_std, pluralize, signed, two_digits
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    at_least,
    gaps_to_full,
    group_by,
    interval,
    mean_score,
    paired_differences,
    paired_interval,
    percent_trained,
    shared_problems,
)
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        shared = shared_problems(group)
        inside = group_by([r for r in group if (r.network, r.problem) in shared], lambda r: r.contender)
        whole = [name for name, runs in inside.items() if {(r.network, r.problem) for r in runs} == shared]
        adapters = {name: gaps_to_full([*inside[name], *inside[FULL]])[name] for name in whole if is_adapter(name)}
        if adapters:
            name = max(adapters, key=lambda name: adapters[name])
            trained = two_digits(_cost(inside[name]))
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
            *(
                claim
                for network, group in group_by(compared, lambda r: r.network).items()
                if (claim := _nonlinear(network, group))
            ),
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
        visible = window([value for values in marks.values() for value in values])
        for row, (name, values) in enumerate(marks.items()):
            style = {key: look.series(0 if is_adapter(name) else 1)[key] for key in ("color", "marker")}
            inside = [value for value in values if value in visible]
            axes.plot(inside, [row] * len(inside), markersize=3.5, alpha=0.6, **{**style, "linestyle": ""})
            mean_style = style if gaps[name] in visible else {**style, "marker": "<" if gaps[name] < 0 else ">"}
            axes.plot(visible.clip(gaps[name]), row, markersize=8, **mean_style)
            if outside := [value for value in values if value not in visible]:
                at = visible.clip(outside[0])
                right = at == visible.high
                # above the other marks of the row, if there are any
                offset = (-8 if right else 8, 4 if inside else -3)
                axes.annotate(_numbers(outside), (at, row), offset, textcoords="offset points", fontsize=7,
                              ha="right" if right else "left")  # fmt: skip
        axes.set_yticks(range(len(names)), [f"{name}  {trained[name]} %{partial.get(name, '')}" for name in names])
        axes.axvline(0, color=look.ink, linewidth=0.8)
        axes.grid(axis="x")
        axes.margins(y=0.06)
        axes.set_xlabel(visible.label("points relative to full fine-tuning"))
        return figure

    values = "; ".join(f"{name} {signed(gaps[name])}{partial.get(name, '')}" for name in reversed(names))
    problem_count = pluralize(len(problems), "problem")
    alt = f"Dot plot for {network}, points relative to full fine-tuning, mean over {problem_count}: {values}."
    return Drawing(file_name("compare", network), alt, draw)


def _per_problem(problems: Sequence[Mapping[str, Sequence[Result]]], name: str) -> list[float]:
    """Return the points of a contender relative to full fine-tuning, on each problem that both were run on."""
    shared = [runs for runs in problems if name in runs and FULL in runs]
    return [mean_score(runs[name]) - mean_score(runs[FULL]) for runs in shared]


def _numbers(values: Sequence[float]) -> str:
    """Format the marks beyond the axis: their numbers, or the range of more than two."""
    if len(values) <= 2:
        return join_words([signed(value) for value in values])
    return f"{len(values)} marks, {signed(min(values))} to {signed(max(values))}"


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
    all_tests = [r for r in results if r.split == "test"]
    problems = shared_problems(all_tests)
    if not problems:
        return None
    tests = [r for r in all_tests if (r.network, r.problem) in problems]
    scores: dict[str, float] = {}
    for name, runs in group_by(results, lambda r: r.contender).items():
        own = [r for r in tests if r.contender == name]
        if is_adapter(name) and {(r.network, r.problem) for r in own} == problems and _cost(own) <= MAX_TRAINED:
            score = validated([r for r in runs if r.split == "validation"], problems)
            scores |= {} if score is None else {name: score}
    if not scores:
        return None
    chosen = max(scores, key=lambda name: scores[name])
    runs, full = ([r for r in tests if r.contender == name] for name in (chosen, FULL))
    differences = paired_differences(runs, full)
    span = paired_interval(runs, full) if len(differences) > 1 else None
    return NEAR_FULL.tested(
        modality,
        _reaches(differences, span),
        f"{chosen}: {signed(mean(differences))} points at {two_digits(_cost(runs))} %, mean of "
        f"{pluralize(len(problems), 'problem')}{_interval(span)}",
        len(runs) + len(full),
        modality,
    )


def _cost(results: Sequence[Result]) -> float:
    return max(map(percent_trained, results))


def _reaches(differences: Sequence[float], span: tuple[float, float] | None) -> bool | None:
    """Whether the mean is within `MAX_GAP` of zero and its interval above −`MAX_LOSS`; not if all of it is below."""
    if span is None:
        return None
    low, high = span
    if mean(differences) >= -MAX_GAP and low > -MAX_LOSS:
        return True
    return False if high < -MAX_GAP else None


def _interval(span: tuple[float, float] | None) -> str:
    return "" if span is None else f", 95 % interval {signed(span[0])} to {signed(span[1])}"


def _nonlinear(network: str, results: Sequence[Result]) -> Claim | None:
    """Compare bottlenecks on feature maps with the same ones without an activation between the two 1×1 convolutions."""
    tests = group_by([r for r in results if r.split == "test"], lambda r: r.contender)
    chosen = {r.contender for r in results if "variant" in r.facts}
    gaps = {}
    for linear in (name for name in tests if name.endswith(LINEAR)):
        stem = linear.removesuffix(LINEAR)
        # a bottleneck whose activation was chosen on validation data may be linear itself
        named = [name for name in tests if name.startswith(f"{stem} activation=") and name != linear]
        for name in named or [name for name in (stem,) if name in tests and name not in chosen]:
            if pairs := paired_differences(tests[name], tests[linear]):
                gaps[name] = pairs
    if not gaps or results[0].modality != "image":
        return None
    measured = [
        f"{name}: {signed(mean(pairs))} points at equal parameters, mean of {pluralize(len(pairs), 'pair')}; "
        f"better in {sum(gap > 0 for gap in pairs)}"
        for name, pairs in gaps.items()
    ]
    differences = [gap for pairs in gaps.values() for gap in pairs]
    return NONLINEAR.tested(
        network,
        at_least(differences),
        f"{join_words(measured)}{_interval(interval(differences) if len(differences) > 1 else None)}",
        2 * len(differences),
        "image",
    )
