"""Scatter plot of score by number of trained parameters, one mark per contender."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visadapt.arguments import takes
from visadapt.checks import check_choice
from visadapt.errors import VisadaptError
from visadapt.experiments.catalogue import is_adapter
from visadapt.experiments.record import Result
from visadapt.files import make_folder, replacing
from visadapt.optional import require
from visadapt.printable import printable
from visadapt.report.formatting import mean_and_std
from visadapt.report.statistics import group_by, mean_score, score_std
from visadapt.report.style import Drawing, Look, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@takes()
def plot(results: Sequence[Result], path: str | os.PathLike[str], title: str = "") -> Path:
    """Write a figure of score by trained parameters, heads included, as a fraction of the backbone's.

    Args:
        results: results of any number of contenders and seeds on one problem.
        path: path of the image, ``.svg`` or ``.png``.
        title: title of the figure.

    Returns:
        The path.

    Raises:
        VisadaptError: matplotlib is not installed, or the folder cannot be written to.

    Examples:
        >>> from visadapt.experiments import Result
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{seed}", "compare", "image", "resnet18", "digits", "lora r=4", seed, "test",
        ...                   metric="accuracy", score=0.91, lr=1e-3, epochs=3, **sizes) for seed in (0, 1)]
        >>> visadapt.report.plot(results, "digits.svg").name
        'digits.svg'
    """
    if not results:
        raise VisadaptError("results must have at least one result, got none")
    target = Path(path)
    form = target.suffix.removeprefix(".")
    forms = require("matplotlib.figure", "a figure", "visadapt[plots]").Figure().canvas.get_supported_filetypes()
    check_choice(form, forms, "format of a figure")
    make_folder(target.parent)
    image = size_scatter(results, printable(title)).render(Look(width=6), form)
    with replacing(target) as partial:
        partial.write_bytes(image)
    return target


def size_scatter(results: Sequence[Result], title: str) -> Drawing:
    """Build the figure, with means and standard deviations over seeds."""
    contenders = group_by(results, lambda r: r.contender)

    def x(runs: list[Result]) -> float:
        return 100 * (runs[0].trained + runs[0].head) / runs[0].backbone

    def draw(look: Look) -> Figure:
        figure, (axes,) = look.panels(1, 3.6, title)
        for position, (name, runs) in enumerate(sorted(contenders.items(), key=lambda item: x(item[1]))):
            kind = 0 if is_adapter(name) else 1
            style = {key: look.series(kind)[key] for key in ("color", "marker")}
            axes.errorbar(x(runs), mean_score(runs), score_std(runs) or None, capsize=3, **style)
            # labels alternate above and below, so that they do not overlap
            above = position % 2 == 0
            axes.annotate(name, (x(runs), mean_score(runs)), xytext=(0, 9 if above else -9), textcoords="offset points",
                          ha="center", va="bottom" if above else "top", fontsize=8.5)  # fmt: skip
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.margins(x=0.15, y=0.2)
        axes.set_xlabel("trained parameters, head included, in % of the backbone")
        axes.set_ylabel(f"{results[0].metric} in %")
        return figure

    values = "; ".join(f"{name} {mean_and_std(runs)} % with {x(runs):.2g} %" for name, runs in contenders.items())
    return Drawing("size", f"Score by trained parameters: {values}.", draw)
