"""Report section: tasks learned one after another."""

from __future__ import annotations

from collections.abc import Sequence as Several
from statistics import mean
from typing import TYPE_CHECKING, Any

from visadapt.experiments.record import Result
from visadapt.report.claims import UNFORGOTTEN
from visadapt.report.formatting import file_name, mean_and_std, signed
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import group_by, mean_score
from visadapt.report.style import Drawing, Look
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED = "sequential fine-tuning"
"""Name of the contender whose problems share their weights."""

_HATCHES = ("", "//", "..", "xx", "\\\\", "--")


def sequence(results: Several[Result]) -> Section | None:
    """Build the section of the experiment ``sequence``; None without complete results."""
    networks = group_by([r for r in results if r.experiment == "sequence"], lambda r: r.network)
    chains = {name: chain for network, group in networks.items() for name, chain in _chains(network, group).items()}
    if not chains:
        return None
    findings = []
    for name, group in chains.items():
        last = len(_order(group)) - 1
        totals = {
            contender: _total(runs, last) for contender, runs in _contenders(group).items() if contender != SHARED
        }
        least = min(totals, key=lambda contender: totals[contender])
        findings.append(
            f"{last + 1} tasks on {name} with {least} have {totals[least]:.2f} times the backbone's parameters"
        )
    return Section(
        "sequence",
        "Tasks learned one after another",
        f"{'; '.join(findings)}.",
        "All problems are learned in turn on one network; after each of them, every problem learned so far is measured "
        "again on test data. Bars: parameters of the backbone and all tasks, as a multiple of the backbone's. Lines: "
        "mean change of the earlier problems' scores in points since they were learned. With one task per problem "
        "nothing is forgotten; sequential fine-tuning forgets.",
        tuple(drawing for name, group in chains.items() for drawing in (_bars(name, group), _lines(name, group))),
        tuple(_table(name, group) for name, group in chains.items()),
        tuple(claim for name, group in chains.items() if (claim := _unforgotten(name, group))),
    )


def _chains(network: str, results: Several[Result]) -> dict[str, list[Result]]:
    """Group results by the order of learning; the names are the network's and, except for the longest, the order.

    A contender and seed that an interrupted experiment did not finish is left out.
    """
    runs = {key: _orders(run) for key, run in group_by(results, lambda r: (r.contender, r.seed)).items()}
    orders = {order for (contender, _), complete in runs.items() if contender != SHARED for order in complete}
    longest = [order for order in orders if not any(order == other[: len(order)] for other in orders - {order})]
    chains: dict[str, list[Result]] = {}
    for order in sorted(longest, key=lambda order: (-len(order), order)):
        learned = set(enumerate(order))
        chains[f"{network} ({', '.join(order)})" if chains else network] = [
            r
            for r in results
            if order in runs[r.contender, r.seed] and (r.facts["position"], r.facts["after"]) in learned
        ]
    return chains


def _orders(run: Several[Result], prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Return the completely measured orders that one contender learned with one seed, and their prefixes."""
    longer = {
        (*prefix, after)
        for (position, after), group in group_by(run, lambda r: (r.facts["position"], r.facts["after"])).items()
        if position == len(prefix) and after not in prefix and {r.problem for r in group} == {*prefix, after}
    }
    return longer.union(*(_orders(run, order) for order in longer))


def _contenders(results: Several[Result]) -> dict[str, list[Result]]:
    return group_by(results, lambda r: r.contender)


def _order(results: Several[Result]) -> list[str]:
    """Return the problems in the order of learning."""
    return [after for _, after in sorted({(r.facts["position"], r.facts["after"]) for r in results})]


def _total(results: Several[Result], position: int) -> float:
    return float(next(r.facts["total"] for r in results if r.facts["position"] == position))


def _learned(results: Several[Result]) -> dict[tuple[str, int], Result]:
    """Return (problem, seed) → the result right after the problem was learned."""
    return {(r.problem, r.seed): r for r in results if r.facts["after"] == r.problem}


def _changes(results: Several[Result]) -> dict[int, float]:
    """Return position → mean change of the earlier problems' scores in points since they were learned."""
    learned = _learned(results)
    later = group_by([r for r in results if r.facts["after"] != r.problem], lambda r: int(r.facts["position"]))
    return {
        position: mean(100 * (r.score - learned[r.problem, r.seed].score) for r in group)
        for position, group in sorted(later.items())
    }


def _bars(network: str, results: Several[Result]) -> Drawing:
    order = _order(results)
    contenders = {name: group for name, group in _contenders(results).items() if name != SHARED}

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.2, f"{network}: parameters of the backbone and all tasks / the backbone's")
        width = 0.8 / len(contenders)
        for number, (name, group) in enumerate(contenders.items()):
            heights = [_total(group, position) for position in range(len(order))]
            x = [position + (number - (len(contenders) - 1) / 2) * width for position in range(len(order))]
            style: dict[str, Any] = {
                "color": look.colour(number),
                "hatch": _HATCHES[number % 6],
                "edgecolor": look.paper,
            }
            bars = axes.bar(x, heights, width * 0.92, label=name, **style)
            axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7.5, padding=1)
        axes.axhline(1, color=look.ink, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(order)), [f"+ {name}" for name in order], rotation=20 if look.narrow else 0)
        axes.set_ylabel("parameters / the backbone's")
        axes.margins(y=0.12)
        look.legend(figure)
        return figure

    values = "; ".join(f"{name} {_total(group, len(order) - 1):.2f}" for name, group in contenders.items())
    alt = (
        f"Bars of the parameters of backbone and tasks on {network}, as a multiple of the backbone's; after "
        f"{len(order)} tasks: {values}."
    )
    return Drawing(file_name("sequence", network, "parameters"), alt, draw)


def _lines(network: str, results: Several[Result]) -> Drawing:
    order = _order(results)
    contenders = {name: _changes(group) for name, group in _contenders(results).items()}

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.0, f"{network}: mean change of earlier tasks' scores")
        for number, (name, changes) in enumerate(contenders.items()):
            axes.plot(list(changes), list(changes.values()), label=name, **look.series(number))
        axes.set_xticks(range(1, len(order)), [f"+ {name}" for name in order[1:]], rotation=20 if look.narrow else 0)
        axes.margins(x=0.1)
        axes.set_ylabel("points since they were learned")
        look.legend(figure)
        return figure

    values = "; ".join(
        f"{name} {signed(list(changes.values())[-1])}" for name, changes in contenders.items() if changes
    )
    alt = f"Lines of the change of earlier tasks' scores on {network}; in points after the last task: {values}."
    return Drawing(file_name("sequence", network, "memory"), alt, draw)


def _table(network: str, results: Several[Result]) -> Table:
    order = _order(results)
    rows = []
    for name, group in _contenders(results).items():
        learned = list(_learned(group).values())
        final = [r for r in group if r.facts["after"] == order[-1]]
        forgotten = signed(mean_score(final) - mean_score(learned))
        rows.append(
            (name, f"{_total(group, len(order) - 1):.2f}", mean_and_std(learned), mean_and_std(final), forgotten)
        )
    headings = ("method", "parameters / backbone", "when learned, %", "at the end, %", "change, points")
    title = f"{network}: {', '.join(order)}, in this order; mean ± standard deviation over problems and seeds"
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
    return UNFORGOTTEN.tested(
        network,
        same == len(pairs),
        f"{same} of {len(pairs)} later measurements",
        len({(r.contender, r.seed, r.facts["after"]) for r in results if r.contender != SHARED}),
        results[0].modality,
    )
