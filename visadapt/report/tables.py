"""Results as the examples print them: one problem, a row a contender."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from visadapt.experiments.record import Result
from visadapt.report.statistics import grouped, share, told
from visadapt.table import Table


def table(results: Sequence[Result], title: str = "") -> Table:
    """One row a contender: score (mean and standard deviation over seeds), parameters, seconds, file size."""
    rows = []
    for name, own in grouped(results, lambda r: r.contender).items():
        first = own[0]
        rows.append(
            (
                name,
                told(own),
                f"{first.trained:,}",
                f"{share(first):.2f} %",
                f"{first.head:,}",
                f"{mean(result.seconds for result in own):.0f}",
                f"{first.bytes / 1e6:.2f} MB",
            )
        )
    headings = ("method", "accuracy, %", "trained", "of backbone", "head", "seconds", "file")
    return Table(headings, rows, title)


def sweep_table(results: Sequence[Result], title: str = "") -> Table:
    """One row a contender: its validation score in % at each learning rate, the best starred."""
    rows = []
    for name, found in grouped(results, lambda r: r.contender).items():
        own = sorted((r for r in found if r.split == "validation"), key=lambda r: r.lr)
        best = max(own, key=lambda result: result.standing)
        cells = [
            f"{r.lr:g}: {'diverged' if r.diverged else f'{100 * r.score:.1f}'}{' *' if r == best else ''}" for r in own
        ]
        rows.append((name, best.epochs, "   ".join(cells), f"{best.lr:g}"))
    return Table(("method", "epochs", "validation score in % by learning rate", "picked"), rows, title)
