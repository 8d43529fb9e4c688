"""The figure that goes with the table: accuracy against what was trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result


def plot(results: Sequence[Result], path: str | os.PathLike[str], title: str = "") -> Path:
    """Writes a figure of accuracy against the fraction of the backbone that was trained, head included.

    Args:
        results: of any number of contenders and seeds.
        path: of the picture; its suffix chooses the format.
        title: above it.

    Returns:
        The path.

    Raises:
        VisadaptError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VisadaptError("the figure needs matplotlib: pip install 'visadapt[plots]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == name]
        scores = [100 * result.score for result in own]
        x = 100 * (own[0].trained + own[0].head) / own[0].backbone
        axes.errorbar(x, mean(scores), stdev(scores) if len(scores) > 1 else None, fmt="o", capsize=3)
        axes.annotate(name, (x, mean(scores)), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("trained parameters, head included, in % of the backbone")
    axes.set_ylabel("test accuracy in %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
