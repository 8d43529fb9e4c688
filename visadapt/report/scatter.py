"""Score against the number of trained parameters, one dot a contender."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visadapt.experiments.record import Result
from visadapt.files import replacing
from visadapt.report.statistics import average, grouped, is_adapter, spread, told
from visadapt.report.style import Drawing, Look, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(results: Sequence[Result], path: str | os.PathLike[str], title: str = "") -> Path:
    """Writes a figure of score against the fraction of the backbone that was trained, head included.

    Args:
        results: of any number of contenders and seeds on one problem.
        path: of the picture, ``.svg`` or ``.png``.
        title: above it.

    Returns:
        The path.

    Raises:
        VisadaptError: matplotlib is not installed, or the folder cannot be written to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = against_size(results, title).render(Look(width=6), target.suffix.removeprefix("."))
    with replacing(target) as partial:
        partial.write_bytes(picture)
    return target


def against_size(results: Sequence[Result], title: str) -> Drawing:
    """The figure: means and standard deviations over seeds."""
    contenders = grouped(results, lambda r: r.contender)

    def x(own: list[Result]) -> float:
        return 100 * (own[0].trained + own[0].head) / own[0].backbone

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.6, title)
        for place, (name, own) in enumerate(sorted(contenders.items(), key=lambda item: x(item[1]))):
            kind = 0 if is_adapter(name) else 1
            style = {key: look.series(kind)[key] for key in ("color", "marker")}
            axes.errorbar(x(own), average(own), spread(own) or None, capsize=3, **style)
            # neighbours above and below in turn, so that names do not meet
            above = place % 2 == 0
            axes.annotate(name, (x(own), average(own)), xytext=(0, 9 if above else -9), textcoords="offset points",
                          ha="center", va="bottom" if above else "top", fontsize=8.5)  # fmt: skip
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.margins(x=0.15, y=0.2)
        axes.set_xlabel("trained parameters, head included, in % of the backbone")
        axes.set_ylabel(f"{results[0].metric} in %")
        return figure

    words = "; ".join(f"{name} {told(own)} % with {x(own):.2g} %" for name, own in contenders.items())
    return Drawing("size", f"Score against trained parameters: {words}.", draw)
