"""Images and text on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import against_full, average, grouped, is_adapter, listed, share, signed
from visadapt.report.style import Drawing, Look, plain_ticks
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 1.0
"""Points below adapters in all layers that still count as no loss."""

Networks = dict[str, list[Result]]


def modality(results: Sequence[Result]) -> Section | None:
    """The section of the experiment ``modality``."""
    own = [r for r in results if r.experiment == "modality" and r.split == "test"]
    flat = grouped([r for r in own if "where" not in r.facts], lambda r: r.network)
    deep = grouped([r for r in own if "where" in r.facts], lambda r: r.network)
    gaps = {network: found for network, group in flat.items() if (found := against_full(group))}
    claims = tuple(claim for network, group in deep.items() if (claim := _upper(network, group)))
    best = [
        f"the best adapter on {network} is at {signed(max(adapters))} points"
        for network, found in gaps.items()
        if (adapters := [gap for name, gap in found.items() if is_adapter(name)])
    ]
    if not best and not claims:
        return None
    return Section(
        "modality",
        "Images and text on one axis",
        f"Against full fine-tuning {listed(best)}." if best else f"{claims[0].case}: {claims[0].measured}.",
        "First, every method is a mark: what it trains, and how far it is from full fine-tuning of the same backbone "
        "in the mean over problems. Then, adapters stand in the first or in the last k layers only, with the norms "
        "frozen, against adapters in all of them: Houlsby et al. 2019 (§3.6) find that upper layers suffice on text, "
        "Rebuffi et al. 2018 (§4.2) that both ends need adapting on images.",
        (*((_scatter(flat, gaps),) if gaps else ()), *((_depth(deep),) if deep else ())),
        (_table(flat, gaps),) if flat else (),
        claims,
    )


def _scatter(networks: Networks, gaps: dict[str, dict[str, float]]) -> Drawing:
    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.8, "Points against full fine-tuning, by what is trained")
        for number, (network, found) in enumerate(gaps.items()):
            style = look.series(number)
            for kind, filled in (("adapters", True), ("own parameters", False)):
                names = [name for name in found if is_adapter(name) is filled]
                x = [mean(share(r) for r in networks[network] if r.contender == name) for name in names]
                face = style["color"] if filled else "none"
                axes.scatter(x, [found[name] for name in names], s=38, marker=style["marker"], facecolors=face,
                             edgecolors=style["color"], alpha=0.85, label=f"{network}, {kind}")  # fmt: skip
        axes.axhline(0, color=look.ink, linewidth=0.8)
        # a linear probe trains nothing of the backbone
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlim(-0.003, 180)
        plain_ticks(axes.xaxis)
        axes.set_xlabel("trained parameters in % of the backbone, heads apart")
        axes.set_ylabel("points against full fine-tuning")
        look.legend(figure)
        return figure

    words = "; ".join(
        f"{network}: " + ", ".join(f"{name} {signed(gap)}" for name, gap in found.items())
        for network, found in gaps.items()
    )
    return Drawing("modality", f"Scatter of points against full fine-tuning by trained parameters. {words}.", draw)


def _at(results: Sequence[Result], end: str) -> dict[int, float]:
    """k → mean over problems of points against adapters in all layers, for the ``first`` or the ``last`` k."""
    found: dict[int, list[float]] = {}
    for group in grouped(results, lambda r: r.problem).values():
        by = grouped(group, lambda r: (r.facts["where"].partition(" ")[0], r.facts["k"]))
        everywhere = next((own for (where, _), own in by.items() if where == "all"), None)
        for (where, k), own in by.items() if everywhere else ():
            if where == end:
                found.setdefault(k, []).append(average(own) - average(everywhere or own))
    return {k: mean(values) for k, values in sorted(found.items())}


def _depth(networks: Networks) -> Drawing:
    ends = {network: {end: _at(group, end) for end in ("first", "last")} for network, group in networks.items()}

    def draw(look: Look) -> Figure:
        figure, panels = look.panels(len(networks), 2.8, "Where in depth adapters are needed", sharey=True)
        for axes, (network, group) in zip(panels, networks.items(), strict=True):
            for number, (end, points) in enumerate(ends[network].items()):
                axes.plot(list(points), list(points.values()), label=f"{end} k layers", **look.series(number))
            axes.axhline(0, color=look.ink, linewidth=0.8)
            axes.set_title(f"{network}, {group[0].facts['layers']} layers")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(ends[network]["last"]))
            plain_ticks(axes.xaxis)
            axes.set_xlabel("k, layers with adapters")
            axes.set_ylabel("points against all layers")
        look.legend(figure)
        return figure

    words = "; ".join(
        f"{network}: "
        + ", ".join(f"{end} {k} {signed(gap)}" for end, points in by.items() for k, gap in points.items())
        for network, by in ends.items()
    )
    return Drawing("modality-depth", f"Lines of points against adapters in all layers. {words}.", draw)


def _upper(network: str, results: Sequence[Result]) -> Claim | None:
    """What the last half of the layers can do alone: enough on text, too little on images, by the papers."""
    layers = results[0].facts["layers"]
    first, last = _at(results, "first"), _at(results, "last")
    k = layers // 2
    if k not in first or k not in last:
        return None
    measured = f"last {k} of {layers} layers: {signed(last[k])} points, first {k}: {signed(first[k])}"
    enough = last[k] >= -NEAR
    if results[0].modality == "text":
        text = f"The upper half of the layers suffices on text: within {NEAR:g} point of all of them"
        return Claim(text, "Houlsby et al. 2019, §3.6", network, enough, measured)
    text = f"Both ends need adapting on images: the upper half alone is more than {NEAR:g} point below all layers"
    return Claim(text, "Rebuffi et al. 2018, §4.2", network, not enough, measured)


def _table(networks: Networks, gaps: dict[str, dict[str, float]]) -> Table:
    """Methods by what they train, with two columns for each network."""
    by = {network: grouped(group, lambda r: r.contender) for network, group in networks.items()}
    trained = {network: {name: share(own[0]) for name, own in group.items()} for network, group in by.items()}
    names = sorted({name for group in by.values() for name in group})
    rows = []
    for name in sorted(names, key=lambda name: mean(shares[name] for shares in trained.values() if name in shares)):
        cells = []
        for network, shares in trained.items():
            cells.append(signed(gaps[network][name]) if name in gaps.get(network, {}) else "–")
            cells.append(f"{shares[name]:.2f} %" if name in shares else "–")
        rows.append((name, *cells))
    over = [f"{listed(list(dict.fromkeys(r.problem for r in own)))} ({network})" for network, own in networks.items()]
    headings = ("method", *(heading for network in networks for heading in (network, "of backbone")))
    return Table(headings, rows, f"Points against full fine-tuning, in the mean over {'; '.join(over)}")
