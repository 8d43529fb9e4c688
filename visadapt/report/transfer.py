"""From domain to domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.heatmap import heatmaps
from visadapt.report.section import Section
from visadapt.report.statistics import average, file_name, grouped, signed, told
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gains = dict[tuple[str, str], float]
"""(Target, source) → points gained by starting from the source's adapters rather than anew."""


def transfer(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``transfer``."""
    own = [r for r in results if r.experiment == "transfer" and r.split == "test"]
    networks = {name: group for name, group in grouped(own, lambda r: r.network).items() if _gains(group)}
    if not networks:
        return None
    every = [(gain, pair, name) for name, group in networks.items() for pair, gain in _gains(group).items()]
    (least, *_), (most, (target, source), network) = min(every), max(every)
    return Section(
        "transfer",
        "From domain to domain",
        f"Starting from another domain's adapters changes the score by {signed(least)} to {signed(most)} points; most "
        f"is gained on {target} from {source} ({network}).",
        "A row is the domain that is learned, a column the one whose adapters and norms it starts from, with a new "
        "head; points against adapters that are drawn anew, on test data, mean over seeds.",
        tuple(_matrix(name, group) for name, group in networks.items()),
        tuple(_table(name, group) for name, group in networks.items()),
    )


def _gains(results: Sequence[Result]) -> Gains:
    gains: Gains = {}
    for target, group in grouped(results, lambda r: r.problem).items():
        by = grouped(group, lambda r: r.facts["source"])
        if None in by:
            gains |= {(target, s): average(own) - average(by[None]) for s, own in by.items() if s is not None}
    return gains


def _matrix(network: str, results: Sequence[Result]) -> Drawing:
    gains = _gains(results)
    targets = list(dict.fromkeys(target for target, _ in gains))
    names = list(dict.fromkeys([*targets, *(source for _, source in gains)]))

    def draw(look: Look) -> Figure:
        title = f"{network}: points gained by starting from another domain's adapters"
        figure, drawn = look.panels(1, 1.2 + 0.5 * len(targets), title)
        heatmaps(drawn, look, [[[gains.get((target, source)) for source in names] for target in targets]], names)
        drawn[0].set_xlabel("starts from")
        drawn[0].set_ylabel("learns")
        return figure

    words = "; ".join(f"{target} from {source} {signed(gain)}" for (target, source), gain in gains.items())
    return Drawing(file_name("transfer", network), f"Matrix of points gained on {network}: {words}.", draw)


def _table(network: str, results: Sequence[Result]) -> Table:
    problems = grouped(results, lambda r: r.problem)
    rows = [
        (target, *(told([r for r in group if r.facts["source"] == source]) for source in (None, *problems)))
        for target, group in problems.items()
    ]
    return Table(("learns", "anew", *(f"from {name}" for name in problems)), rows, f"{network}: score in %")
