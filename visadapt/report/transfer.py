"""Report section: transfer between domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.formatting import file_name, mean_and_std, signed
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Section
from visadapt.report.statistics import group_by, mean_score
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
        "new head. Points relative to training from scratch, on test data, mean over seeds.",
        tuple(_matrix(name, group) for name, group in networks.items()),
        tuple(_table(name, group) for name, group in networks.items()),
    )


def _gains(results: Sequence[Result]) -> Gains:
    gains: Gains = {}
    for target, group in group_by(results, lambda r: r.problem).items():
        by = group_by(group, lambda r: r.facts["source"])
        if None in by:
            gains |= {(target, s): mean_score(runs) - mean_score(by[None]) for s, runs in by.items() if s is not None}
    return gains


def _matrix(network: str, results: Sequence[Result]) -> Drawing:
    gains = _gains(results)
    targets = list(dict.fromkeys(target for target, _ in gains))
    names = list(dict.fromkeys([*targets, *(source for _, source in gains)]))

    def draw(look: Look) -> Figure:
        title = f"{network}: points gained by starting from another domain's adapters"
        figure, (axes,) = look.panels(1, 1.2 + 0.5 * len(targets), title)
        heatmaps([axes], look, [[[gains.get((target, source)) for source in names] for target in targets]], names)
        axes.set_xlabel("starts from")
        axes.set_ylabel("learns")
        return figure

    values = "; ".join(f"{target} from {source} {signed(gain)}" for (target, source), gain in gains.items())
    return Drawing(file_name("transfer", network), f"Matrix of points gained on {network}: {values}.", draw)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = group_by(results, lambda r: r.problem)
    rows = [
        (target, *(mean_and_std([r for r in group if r.facts["source"] == source]) for source in (None, *problems)))
        for target, group in problems.items()
    ]
    return Table(("learns", "from scratch", *(f"from {name}" for name in problems)), rows, f"{network}: score in %")
