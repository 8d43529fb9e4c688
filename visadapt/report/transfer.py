"""Report section: transfer between domains."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.claims import HELPS
from visadapt.report.formatting import join_words, mean_and_std, pluralize, signed
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import at_least, group_by, interval, mean_score, paired_differences, paired_interval
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gains = dict[tuple[str, str], float]
"""(Target, source) → points gained by starting from the source's adapters instead of from scratch."""


def transfer(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``transfer``; None without a pair of domains."""
    tests = [r for r in results if r.experiment == "transfer" and r.split == "test"]
    networks = {name: group for name, group in group_by(tests, lambda r: r.network).items() if _gains(group)}
    if not networks:
        return None
    gains = [(gain, pair, name) for name, group in networks.items() for pair, gain in _gains(group).items()]
    (least, *_), (most, (target, source), network) = min(gains), max(gains)
    return Section(
        "transfer",
        "Transfer between domains",
        f"Starting from another domain's adapters changes the score by {signed(least)} to {signed(most)} points; the "
        f"largest gain is on {target} from {source} ({network}).",
        "Rows are the domains that are learned, columns the domains whose adapters and norms they start from, with a "
        "new head. Points relative to training from scratch, on test data, mean over seeds. The first table has the "
        "mean over the other domains, with its 95 % interval over these and the seeds: of each domain as the one that "
        "is learned, and as the one that is started from.",
        (_matrices(networks),),
        tuple(table for name, group in networks.items() for table in (_means(name, group), _table(name, group))),
        tuple(_helps(name, group) for name, group in networks.items()),
    )


def _gains(results: Sequence[Result]) -> Gains:
    gains: Gains = {}
    for target, group in group_by(results, lambda r: r.problem).items():
        by = group_by(group, lambda r: r.facts["source"])
        if None in by:
            gains |= {(target, s): mean_score(runs) - mean_score(by[None]) for s, runs in by.items() if s is not None}
    return gains


def _differences(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Return (target, source) → points gained, one per seed that both were run with."""
    scratch = [r for r in results if r.facts["source"] is None]
    pairs = group_by([r for r in results if r.facts["source"] is not None], lambda r: (r.problem, r.facts["source"]))
    return {pair: each for pair, runs in pairs.items() if (each := paired_differences(runs, scratch))}


def _matrices(networks: dict[str, list[Result]]) -> Drawing:
    """Draw the matrices of all networks side by side."""
    gains = {network: _gains(group) for network, group in networks.items()}
    targets = {network: list(dict.fromkeys(target for target, _ in by)) for network, by in gains.items()}
    names = {
        network: list(dict.fromkeys([*targets[network], *(source for _, source in by)]))
        for network, by in gains.items()
    }

    def draw(look: Look) -> Figure:
        title = "Points gained by starting from another domain's adapters"
        height = 1.5 + 0.36 * max(map(len, targets.values()))
        figure, panels = look.panels(len(networks), height, title)
        matrices = [
            [[by.get((target, source)) for source in names[network]] for target in targets[network]]
            for network, by in gains.items()
        ]
        heatmaps(panels, look, matrices, list(names.values()))
        for axes, network in zip(panels, networks, strict=True):
            axes.set_title(network)
            axes.set_xlabel("starts from")
            axes.set_ylabel("learns")
        return figure

    values = "; ".join(
        f"{network}: " + ", ".join(f"{target} from {source} {signed(gain)}" for (target, source), gain in by.items())
        for network, by in gains.items()
    )
    return Drawing("transfer", f"Matrices of points gained, side by side. {values}.", draw)


def _means(network: str, results: Sequence[Result]) -> Table:
    """Build the table of mean gains by domain, as the one that is learned and as the one that is started from."""
    differences = _differences(results)
    domains = list(dict.fromkeys(name for pair in differences for name in pair))
    rows = [
        (domain, *(cell for end in (0, 1) for cell in _mean_gain(_at(differences, domain, end)))) for domain in domains
    ]
    headings = ("domain", "learns: points", "95 % interval", "starts others: points", "95 % interval")
    return Table(headings, rows, f"{network}: mean gain over the other domains and seeds")


def _at(differences: dict[tuple[str, str], list[float]], domain: str, end: int) -> list[float]:
    return [value for pair, values in differences.items() if pair[end] == domain for value in values]


def _mean_gain(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "–", "–"
    return signed(mean(values)), " to ".join(map(signed, interval(values))) if len(values) > 1 else "–"


def _helps(network: str, results: Sequence[Result]) -> Claim:
    differences = _differences(results)
    values = [value for each in differences.values() for value in each]
    scratch = [r for r in results if r.facts["source"] is None]
    ends = [
        paired_interval([r for r in results if (r.problem, r.facts["source"]) == pair], scratch)
        for pair, each in differences.items()
        if len(each) > 1
    ]
    decided = [f"{sum(low > 0 for low, _ in ends)} better", f"{sum(high < 0 for _, high in ends)} worse"]
    measured = "no pair shares a seed"
    if values:
        span = f", 95 % interval {' to '.join(map(signed, interval(values)))}" if len(values) > 1 else ""
        measured = (
            f"{signed(mean(values))} points, mean of {pluralize(len(differences), 'pair')}{span}; by their own "
            f"intervals {join_words(decided)}"
        )
    return HELPS.tested(network, at_least(values), measured, len(results), results[0].modality)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = group_by(results, lambda r: r.problem)
    rows = [
        (target, *(mean_and_std([r for r in group if r.facts["source"] == source]) for source in (None, *problems)))
        for target, group in problems.items()
    ]
    return Table(("learns", "from scratch", *(f"from {name}" for name in problems)), rows, f"{network}: score in %")
