"""Tasks learned one after another."""

from __future__ import annotations

from collections.abc import Sequence as Several
from statistics import mean
from typing import TYPE_CHECKING, Any

from visadapt.experiments.record import Result
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import average, file_name, grouped, signed, told
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED = "sequential fine-tuning"
"""The contender without tasks of their own."""

_HATCHES = ("", "//", "..", "xx", "\\\\", "--")


def sequence(results: Several[Result]) -> Section | None:
    """The section of the experiment ``sequence``."""
    networks = grouped([r for r in results if r.experiment == "sequence"], lambda r: r.network)
    chains = {name: chain for network, group in networks.items() for name, chain in _chains(network, group).items()}
    if not chains:
        return None
    seen = []
    for name, group in chains.items():
        last = len(_order(group)) - 1
        totals = {who: _total(of, last) for who, of in _contenders(group).items() if who != SHARED}
        least = min(totals, key=lambda who: totals[who])
        seen.append(f"{last + 1} tasks on {name} by {least} take {totals[least]:.2f} times the backbone's parameters")
    return Section(
        "sequence",
        "Tasks learned one after another",
        f"{'; '.join(seen)}.",
        "All problems are learned in turn on one network, and after each every one learned so far is measured again on "
        "test data. Bars: parameters of the backbone and all tasks together, as a multiple of the backbone. Lines: the "
        "mean change of what was learned before, in points since it was learned. A task of its own forgets nothing; "
        "weights that are trained on do.",
        tuple(drawing for name, group in chains.items() for drawing in (_bars(name, group), _lines(name, group))),
        tuple(_table(name, group) for name, group in chains.items()),
        tuple(claim for name, group in chains.items() if (claim := _unforgotten(name, group))),
    )


def _chains(network: str, results: Several[Result]) -> dict[str, list[Result]]:
    """The results of each order that problems were learned in, by the network's name and, after the longest, the order.

    Where an experiment was killed, a contender and seed may have come less far than others: it is left out.
    """
    runs = {who: _orders(run) for who, run in grouped(results, lambda r: (r.contender, r.seed)).items()}
    orders = {order for (contender, _), own in runs.items() if contender != SHARED for order in own}
    whole = [order for order in orders if not any(order == other[: len(order)] for other in orders - {order})]
    chains: dict[str, list[Result]] = {}
    for order in sorted(whole, key=lambda order: (-len(order), order)):
        learned = set(enumerate(order))
        chains[f"{network} ({', '.join(order)})" if chains else network] = [
            r
            for r in results
            if order in runs[r.contender, r.seed] and (r.facts["position"], r.facts["after"]) in learned
        ]
    return chains


def _orders(run: Several[Result], begun: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The orders that one contender learned with one seed, and their beginnings, as far as all of it was measured."""
    further = {
        (*begun, after)
        for (position, after), asked in grouped(run, lambda r: (r.facts["position"], r.facts["after"])).items()
        if position == len(begun) and after not in begun and {r.problem for r in asked} == {*begun, after}
    }
    return further.union(*(_orders(run, order) for order in further))


def _contenders(results: Several[Result]) -> dict[str, list[Result]]:
    return grouped(results, lambda r: r.contender)


def _order(results: Several[Result]) -> list[str]:
    """The problems as they were learned."""
    return [after for _, after in sorted({(r.facts["position"], r.facts["after"]) for r in results})]


def _total(results: Several[Result], position: int) -> float:
    return float(next(r.facts["total"] for r in results if r.facts["position"] == position))


def _learned(results: Several[Result]) -> dict[tuple[str, int], Result]:
    """(Problem, seed) → the result right after it was learned."""
    return {(r.problem, r.seed): r for r in results if r.facts["after"] == r.problem}


def _changes(results: Several[Result]) -> dict[int, float]:
    """Position → mean change of the problems learned before, since they were learned, in points."""
    learned = _learned(results)
    later = grouped([r for r in results if r.facts["after"] != r.problem], lambda r: int(r.facts["position"]))
    return {
        position: mean(100 * (r.score - learned[r.problem, r.seed].score) for r in group)
        for position, group in sorted(later.items())
    }


def _bars(network: str, results: Several[Result]) -> Drawing:
    order = _order(results)
    contenders = {name: group for name, group in _contenders(results).items() if name != SHARED}

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.2, f"{network}: parameters of all tasks together, in backbones")
        width = 0.8 / len(contenders)
        for number, (name, group) in enumerate(contenders.items()):
            heights = [_total(group, position) for position in range(len(order))]
            places = [position + (number - (len(contenders) - 1) / 2) * width for position in range(len(order))]
            style: dict[str, Any] = {
                "color": look.colour(number),
                "hatch": _HATCHES[number % 6],
                "edgecolor": look.paper,
            }
            bars = axes.bar(places, heights, width * 0.92, label=name, **style)
            axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7.5, padding=1)
        axes.axhline(1, color=look.ink, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(order)), [f"+ {name}" for name in order], rotation=20 if look.narrow else 0)
        axes.set_ylabel("parameters / the backbone's")
        axes.margins(y=0.12)
        look.legend(figure)
        return figure

    words = "; ".join(f"{name} {_total(group, len(order) - 1):.2f}" for name, group in contenders.items())
    alt = f"Bars of the parameters of backbone and tasks on {network}; after {len(order)} tasks, in backbones: {words}."
    return Drawing(file_name("sequence", network, "parameters"), alt, draw)


def _lines(network: str, results: Several[Result]) -> Drawing:
    order = _order(results)
    contenders = {name: _changes(group) for name, group in _contenders(results).items()}

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.0, f"{network}: what is left of earlier tasks as further ones are learned")
        for number, (name, changes) in enumerate(contenders.items()):
            axes.plot(list(changes), list(changes.values()), label=name, **look.series(number))
        axes.set_xticks(range(1, len(order)), [f"+ {name}" for name in order[1:]], rotation=20 if look.narrow else 0)
        axes.margins(x=0.1)
        axes.set_ylabel("points since learned")
        look.legend(figure)
        return figure

    words = "; ".join(f"{name} {signed(list(changes.values())[-1])}" for name, changes in contenders.items() if changes)
    alt = f"Lines of the change of earlier tasks' scores on {network}; in points after the last task: {words}."
    return Drawing(file_name("sequence", network, "memory"), alt, draw)


def _table(network: str, results: Several[Result]) -> Table:
    order = _order(results)
    rows = []
    for name, group in _contenders(results).items():
        learned = list(_learned(group).values())
        final = [r for r in group if r.facts["after"] == order[-1]]
        forgotten = signed(average(final) - average(learned))
        rows.append((name, f"{_total(group, len(order) - 1):.2f}", told(learned), told(final), forgotten))
    headings = ("method", "parameters / backbone", "when learned, %", "at the end, %", "change, points")
    title = f"{network}: {', '.join(order)} in this order; mean ± standard deviation over problems and seeds"
    return Table(headings, rows, title)


def _unforgotten(network: str, results: Several[Result]) -> Claim | None:
    pairs = [
        (r.facts["outputs"], learned[r.problem, r.seed].facts["outputs"])
        for name, group in _contenders(results).items()
        if name != SHARED and (learned := _learned(group))
        for r in group
        if r.facts["after"] != r.problem
    ]
    if not pairs:
        return None
    same = sum(now == then for now, then in pairs)
    return Claim(
        "Nothing is forgotten: earlier tasks give the same logits, to the last bit",
        "Houlsby et al. 2019, §1",
        network,
        same == len(pairs),
        f"{same} of {len(pairs)} later measurements",
    )
