"""Tables of results on one problem, with one row per contender."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result
from visadapt.report.formatting import mean_and_std
from visadapt.report.statistics import group_by, percent_trained
from visadapt.table import Table


@takes()
def table(results: Sequence[Result], title: str = "") -> Table:
    """Build a table of scores (mean and standard deviation over seeds), parameters, seconds and file sizes.

    Args:
        results: results on one problem.
        title: title of the table.

    Returns:
        The table, with one row per contender.

    Examples:
        >>> from visadapt.experiments import Result
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{seed}", "compare", "image", "resnet18", "digits", "lora r=4", seed, "test",
        ...                   metric="accuracy", score=0.91, lr=1e-3, epochs=3, **sizes) for seed in (0, 1)]
        >>> visadapt.report.table(results).rows[0][:3]
        ('lora r=4', '91.0 ± 0.0', '2,000')
    """
    rows = []
    for name, runs in group_by(results, lambda r: r.contender).items():
        first = runs[0]
        rows.append(
            (
                name,
                mean_and_std(runs),
                f"{first.trained:,}",
                f"{percent_trained(first):.2f} %",
                f"{first.head:,}",
                f"{mean(result.seconds for result in runs):.0f}",
                f"{first.bytes / 1e6:.2f} MB",
            )
        )
    headings = ("method", "accuracy, %", "trained", "of backbone", "head", "seconds", "file")
    return Table(headings, rows, title)


@takes()
def sweep_table(results: Sequence[Result], title: str = "") -> Table:
    """Build a table of validation scores in % at each learning rate, with the best marked by ``*``.

    Where several numbers of epochs were tried, each score names its own.

    Args:
        results: results on one problem; those on test data are ignored.
        title: title of the table.

    Returns:
        The table, with one row per contender.

    Raises:
        VisadaptError: a contender has no result on validation data.

    Examples:
        >>> from visadapt.experiments import Result
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{lr}", "compare", "image", "resnet18", "digits", "lora r=4", 0, "validation",
        ...                   metric="accuracy", score=0.9 - lr, lr=lr, epochs=3, **sizes) for lr in (0.01, 0.1)]
        >>> visadapt.report.sweep_table(results).rows
        [('lora r=4', 3, '0.01: 89.0 *   0.1: 80.0', '0.01')]
    """
    rows = []
    for name, group in group_by(results, lambda r: r.contender).items():
        trials = sorted((r for r in group if r.split == "validation"), key=lambda r: (r.epochs, r.lr))
        if not trials:
            raise VisadaptError(f"results must have trials on validation data, got none of {name!r}")
        several = len({r.epochs for r in trials}) > 1
        best = max(trials, key=lambda result: result.standing)
        cells = [_trial(r, several) + (" *" if r == best else "") for r in trials]
        rows.append((name, best.epochs, "   ".join(cells), f"{best.lr:g}"))
    return Table(("method", "epochs", "validation score in % by learning rate", "chosen"), rows, title)


def _trial(result: Result, with_epochs: bool) -> str:
    epochs = f" × {result.epochs} epochs" if with_epochs else ""
    return f"{result.lr:g}{epochs}: {'diverged' if result.diverged else f'{100 * result.score:.1f}'}"
