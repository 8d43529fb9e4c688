"""Report section: images and text on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from visadapt.experiments.catalogue import is_adapter
from visadapt.experiments.record import Result
from visadapt.report.claims import BOTH_ENDS, HALF_LOSS, UPPER_HALF
from visadapt.report.clipping import clipped_line, window
from visadapt.report.formatting import join_words, signed
from visadapt.report.section import Claim, Section
from visadapt.report.statistics import (
    at_least,
    gaps_to_full,
    group_by,
    mean_score,
    paired_differences,
    percent_trained,
)
from visadapt.report.style import Drawing, Look, plain_ticks
from visadapt.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Networks = dict[str, list[Result]]
"""Results by network."""


def modality(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``modality``; None without comparable results."""
    tests = [r for r in results if r.experiment == "modality" and r.split == "test"]
    compared = group_by([r for r in tests if "where" not in r.facts], lambda r: r.network)
    by_depth = group_by([r for r in tests if "where" in r.facts], lambda r: r.network)
    gaps = {network: by_name for network, group in compared.items() if (by_name := gaps_to_full(group))}
    claims = tuple(claim for network, group in by_depth.items() if (claim := _upper(network, group)))
    best = [
        f"{signed(max(adapters))} points on {network}"
        for network, by_name in gaps.items()
        if (adapters := [gap for name, gap in by_name.items() if is_adapter(name)])
    ]
    if not best and not claims:
        return None
    return Section(
        "modality",
        "Images and text on one axis",
        f"Best adapter relative to full fine-tuning: {join_words(best)}."
        if best
        else f"{claims[0].case}: {claims[0].measured}.",
        "First figure: one mark per method, by its trained parameters and its distance from full fine-tuning of the "
        "same backbone, mean over problems. Second figure: adapters in the first or the last k layers only, with "
        "frozen norms, relative to adapters in all layers. Houlsby et al. 2019 (§3.6) find that the upper layers "
        "suffice on text, Rebuffi et al. 2018 (§4.2) that both ends need adapting on images.",
        (*((_scatter(compared, gaps),) if gaps else ()), *((_depth(by_depth),) if by_depth else ())),
        (_table(compared, gaps),) if compared else (),
        claims,
    )


def _scatter(networks: Networks, gaps: dict[str, dict[str, float]]) -> Drawing:
    visible = window([gap for by_name in gaps.values() for gap in by_name.values()])

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.8, "Points relative to full fine-tuning, by trained parameters")
        for number, (network, by_name) in enumerate(gaps.items()):
            style = look.series(number)
            for kind, filled in (("adapters", True), ("own parameters", False)):
                names = [name for name in by_name if is_adapter(name) is filled]
                x = [mean(percent_trained(r) for r in networks[network] if r.contender == name) for name in names]
                face = style["color"] if filled else "none"
                y = [visible.clip(by_name[name]) for name in names]
                axes.scatter(x, y, s=38, marker=style["marker"], facecolors=face,
                             edgecolors=style["color"], alpha=0.85, label=f"{network}, {kind}")  # fmt: skip
                for place, name in zip(x, names, strict=True):
                    if by_name[name] not in visible:
                        clipped_line(axes, visible, [place], [by_name[name]], color=style["color"], linestyle="")
        axes.axhline(0, color=look.ink, linewidth=0.8)
        # symlog, since a linear probe trains 0 %
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlim(-0.003, 180)
        plain_ticks(axes.xaxis)
        axes.set_xlabel("trained parameters in % of the backbone, without heads")
        axes.set_ylabel(visible.label("points relative to full fine-tuning"))
        look.legend(figure)
        return figure

    values = "; ".join(
        f"{network}: " + ", ".join(f"{name} {signed(gap)}" for name, gap in by_name.items())
        for network, by_name in gaps.items()
    )
    alt = f"Scatter plot of points relative to full fine-tuning by trained parameters. {values}."
    return Drawing("modality", alt, draw)


def _gaps_to_all(results: Sequence[Result], end: str) -> dict[int, float]:
    """Return k → points relative to adapters in all layers, mean over problems, for the ``first`` or ``last`` k."""
    gaps: dict[int, list[float]] = {}
    for group in group_by(results, lambda r: r.problem).values():
        by = group_by(group, lambda r: (r.facts["where"].partition(" ")[0], r.facts["k"]))
        all_layers = next((runs for (where, _), runs in by.items() if where == "all"), None)
        for (where, k), runs in by.items() if all_layers else ():
            if where == end:
                gaps.setdefault(k, []).append(mean_score(runs) - mean_score(all_layers or runs))
    return {k: mean(values) for k, values in sorted(gaps.items())}


def _depth(networks: Networks) -> Drawing:
    ends = {
        network: {end: _gaps_to_all(group, end) for end in ("first", "last")} for network, group in networks.items()
    }

    visible = window([gap for by in ends.values() for points in by.values() for gap in points.values()])

    def draw(look: Look) -> Figure:
        figure, panels = look.panels(len(networks), 2.8, "Which layers need adapters", sharey=True)
        for axes, (network, group) in zip(panels, networks.items(), strict=True):
            for number, (end, points) in enumerate(ends[network].items()):
                style = look.series(number)
                clipped_line(axes, visible, list(points), list(points.values()), label=f"{end} k layers", **style)
            axes.axhline(0, color=look.ink, linewidth=0.8)
            axes.set_title(f"{network}, {group[0].facts['layers']} layers")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(ends[network]["last"]))
            plain_ticks(axes.xaxis)
            axes.set_xlabel("k, layers with adapters")
            axes.set_ylabel(visible.label("points relative to all layers"))
        look.legend(figure)
        return figure

    values = "; ".join(
        f"{network}: "
        + ", ".join(f"{end} {k} {signed(gap)}" for end, points in by.items() for k, gap in points.items())
        for network, by in ends.items()
    )
    return Drawing("modality-depth", f"Lines of points relative to adapters in all layers. {values}.", draw)


def _upper(network: str, results: Sequence[Result]) -> Claim | None:
    """Test the papers' claims on the upper half of the layers alone: enough on text, too little on images."""
    layers = results[0].facts["layers"]
    first, last = _gaps_to_all(results, "first"), _gaps_to_all(results, "last")
    k = layers // 2
    if k not in first or k not in last:
        return None
    measured = f"last {k} of {layers} layers: {signed(last[k])} points, first {k}: {signed(first[k])}"
    upper, whole = ([r for r in results if r.facts["where"] == where] for where in (f"last {k}", "all"))
    differences = paired_differences(upper, whole)
    enough, training_runs = at_least(differences, -HALF_LOSS), 2 * len(differences)
    missing = None if enough is None else not enough
    if results[0].modality == "text":
        return UPPER_HALF.tested(network, enough, measured, training_runs, "text")
    return BOTH_ENDS.tested(network, missing, measured, training_runs, "image")


def _table(networks: Networks, gaps: dict[str, dict[str, float]]) -> Table:
    """Build the table of methods by trained parameters, with two columns per network."""
    by = {network: group_by(group, lambda r: r.contender) for network, group in networks.items()}
    trained = {
        network: {name: percent_trained(runs[0]) for name, runs in group.items()} for network, group in by.items()
    }
    names = sorted({name for group in by.values() for name in group})
    rows = []
    for name in sorted(names, key=lambda name: mean(shares[name] for shares in trained.values() if name in shares)):
        cells = []
        for network, shares in trained.items():
            cells.append(signed(gaps[network][name]) if name in gaps.get(network, {}) else "–")
            cells.append(f"{shares[name]:.2f} %" if name in shares else "–")
        rows.append((name, *cells))
    problems = {network: list(dict.fromkeys(r.problem for r in group)) for network, group in networks.items()}
    over = "; ".join(f"{join_words(names)} ({network})" for network, names in problems.items())
    headings = ("method", *(heading for network in networks for heading in (network, "of backbone")))
    return Table(headings, rows, f"Points relative to full fine-tuning, mean over {over}")
