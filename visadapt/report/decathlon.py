"""Report section: one number for many domains."""

from __future__ import annotations

from collections.abc import Container, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.catalogue import FULL, is_adapter
from visadapt.experiments.decathlon import scores_of
from visadapt.experiments.record import Result
from visadapt.report.advice import validated
from visadapt.report.claims import DECATHLON
from visadapt.report.formatting import file_name, join_words, mean_and_std, pluralize
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, interval, shared_problems
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOMAINS = 3
"""Number of domains from which a comparison has a score."""

Case = tuple[str, ...]
"""A network, and the problems that the score covers."""

Scores = dict[str, list[Result]]
"""Decathlon scores by contender."""


def decathlon(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``decathlon``, and of networks compared on several domains of images; None
    without scores."""
    own = [r for r in results if r.experiment == "decathlon"]
    compared = _compared(results, {r.network for r in own})
    scores = [r for r in own if r.metric == "decathlon"]
    for group in group_by([r for r in compared if r.split == "test"], lambda r: r.network).values():
        scores += scores_of(group, FULL)
    groups = group_by(scores, lambda r: (r.network, *r.facts["problems"]))
    cases = {case: group_by(_newest(group), lambda r: r.contender) for case, group in groups.items()}
    if not cases:
        return None
    parts = [*own, *compared]
    return Section(
        "decathlon",
        "One number for many domains",
        f"{'; '.join(_best(case, by) for case, by in cases.items())}.",
        "The score of the Visual Decathlon (Rebuffi et al. 2017, §4) over the available domains: per domain 1,000 "
        "points without errors, 250 for full fine-tuning, 0 at twice its error. Bars are means over seeds, whiskers "
        "the range over seeds.",
        tuple(_bars(case, by) for case, by in cases.items()),
        tuple(_table(case, parts, by) for case, by in cases.items()),
        tuple(claim for case, by in cases.items() if (claim := _beats(case, parts, by))),
    )


def _compared(results: Sequence[Result], known: Container[str]) -> list[Result]:
    """Return the results of comparisons on at least `DOMAINS` domains of images, on those that all share."""
    images = [r for r in results if (r.experiment, r.modality, r.metric) == ("compare", "image", "accuracy")]
    kept = []
    for network, group in group_by(images, lambda r: r.network).items():
        shared = shared_problems([r for r in group if r.split == "test"])
        if len(shared) >= DOMAINS and network not in known:
            kept += [r for r in group if (r.network, r.problem) in shared]
    return kept


def _beats(case: Case, results: Sequence[Result], scores: Scores) -> Claim | None:
    """Test the adapter that is best on validation data against full fine-tuning, paired by seed."""
    network, *names = case
    problems = {(network, name) for name in names}
    trials = group_by([r for r in results if (r.network, r.split) == (network, "validation")], lambda r: r.contender)
    chosen = {
        name: score
        for name in scores
        if is_adapter(name) and (score := validated(trials.get(name, []), problems)) is not None
    }
    if not chosen or FULL not in scores:
        return None
    best = max(chosen, key=lambda name: chosen[name])
    full = {r.seed: r.score for r in scores[FULL]}
    differences = [r.score - full[r.seed] for r in scores[best] if r.seed in full]
    span = ""
    if len(differences) > 1:
        low, high = interval(differences)
        span = f"; difference, 95 % interval {low:+,.0f} to {high:+,.0f}".replace("-", "−")
    return DECATHLON.tested(
        network,
        at_least(differences),
        f"{best}: {_mean(scores[best]):,.0f}, full fine-tuning: {_mean(scores[FULL]):,.0f}, over "
        f"{pluralize(len(problems), 'domain')}{span}",
        len(problems) * (len(scores[best]) + len(scores[FULL])),
        "image",
    )


def _newest(scores: Sequence[Result]) -> list[Result]:
    """Return the scores relative to the baseline with the most seeds; more seeds give a new score for every run."""
    seeds = max(r.facts.get("seeds", 0) for r in scores)
    return [r for r in scores if r.facts.get("seeds", 0) == seeds]


def _mean(scores: Sequence[Result]) -> float:
    return mean(r.score for r in scores)


def _best(case: Case, scores: Scores) -> str:
    network, *problems = case
    best = max(scores, key=lambda name: _mean(scores[name]))
    return (
        f"{best} scores highest, {_mean(scores[best]):,.0f} of {1000 * len(problems):,}, over {join_words(problems)} "
        f"({network})"
    )


def _bars(case: Case, scores: Scores) -> Drawing:
    network, *problems = case
    names = sorted(scores, key=lambda name: _mean(scores[name]))
    means = [_mean(scores[name]) for name in names]
    by_seed = [[r.score for r in scores[name]] for name in names]
    par = 250 * len(problems)

    def draw(look: Look) -> Figure:
        title = f"{network}: decathlon score over {len(problems)} domains"
        figure, (axes,) = look.panels(1, 0.9 + 0.3 * len(names), title)
        down = [center - min(seeds) for seeds, center in zip(by_seed, means, strict=True)]
        up = [max(seeds) - center for seeds, center in zip(by_seed, means, strict=True)]
        axes.barh(names, means, xerr=[down, up], color=look.colour(0), ecolor=look.ink, capsize=2)
        axes.axvline(par, color=look.ink, linewidth=0.8, linestyle=":")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"score; dotted: full fine-tuning, {par:,}")
        return figure

    values = "; ".join(f"{name} {center:,.0f}" for name, center in zip(names, means, strict=True))
    alt = f"Bars of the decathlon score on {network} over {join_words(problems)}: {values}."
    return Drawing(file_name("decathlon", *case), alt, draw)


def _table(case: Case, results: Sequence[Result], scores: Scores) -> Table:
    network, *problems = case
    tests = group_by(
        [r for r in results if (r.network, r.split) == (network, "test")], lambda r: (r.contender, r.problem)
    )
    rows = [
        (
            name,
            *(mean_and_std(tests.get((name, problem), [])) for problem in problems),
            f"{_mean(group):,.0f}",
            f"{group[0].facts['total']:.2f}",
        )
        for name, group in scores.items()
    ]
    headings = ("method", *problems, "score", "parameters / backbone")
    return Table(headings, rows, f"{network}: accuracy in % per domain, and the score")
