"""Report section: one dataclass on every backbone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from visadapt.experiments.catalogue import FULL
from visadapt.experiments.record import Result
from visadapt.report.formatting import join_words, mean_and_std, pluralize, signed
from visadapt.report.section import Section
from visadapt.report.statistics import group_by, paired_differences, paired_interval, percent_trained
from visadapt.table import Table

PROBE = "linear probe"


def crossmodal(results: Sequence[Result]) -> Section | None:
    """Build the section of the experiment ``crossmodal``; None without a bottleneck on test data."""
    tests = [r for r in results if r.experiment == "crossmodal" and r.split == "test"]
    cases = group_by(tests, lambda r: (r.network, r.problem))
    bottlenecks = {case: own for case, group in cases.items() if (own := [r for r in group if "m" in r.facts])}
    if not bottlenecks:
        return None
    shares = [mean(map(percent_trained, own)) for own in bottlenecks.values()]
    random = sorted({r.network for r in tests if r.facts["weights"] == "random"})
    note = f" The weights of {join_words(random)} are random: these scores show that it works, not how well."
    note = note if random else ""
    others = [
        _row(case, runs, group)
        for case, group in cases.items()
        for name, runs in group_by(group, lambda r: r.contender).items()
        if name not in (PROBE, FULL) and "m" not in runs[0].facts
    ]
    rows = [_row(case, own, cases[case]) for case, own in bottlenecks.items()]
    tables = [_table(rows, "The same dataclass, Bottleneck(m), on every backbone")]
    if others:
        tables.append(_table(others, "Other methods on these backbones"))
    return Section(
        "crossmodal",
        "One dataclass on every backbone",
        f"The same Bottleneck(m) adapts {pluralize(len(bottlenecks), 'backbone')} with "
        f"{' to '.join(dict.fromkeys(f'{share:.1f}' for share in (min(shares), max(shares))))} % of their parameters.",
        "The width m is chosen so that the trained fraction of the backbone is about the same. Mean ± standard "
        f"deviation over seeds on test data, and the difference from full fine-tuning, paired by seed.{note}",
        tables=tuple(tables),
    )


def _table(rows: Sequence[Sequence[str]], title: str) -> Table:
    headings = (
        "backbone", "weights", "problem", "method", "of backbone", "file", PROBE, "method, %", FULL, "points",
        "95 % interval",
    )  # fmt: skip
    return Table(headings, rows, title)


def _row(case: tuple[str, str], runs: Sequence[Result], group: Sequence[Result]) -> tuple[str, ...]:
    probe, full = ([r for r in group if r.contender == name] for name in (PROBE, FULL))
    differences = paired_differences(runs, full)
    span = "–"
    if len(differences) > 1:
        span = " to ".join(map(signed, paired_interval(runs, full)))
    network, problem = case
    return (
        network,
        runs[0].facts["weights"],
        problem,
        runs[0].contender,
        f"{mean(map(percent_trained, runs)):.2f} %",
        f"{runs[0].bytes / 1e6:.2f} MB",
        *(mean_and_std(each) for each in (probe, runs, full)),
        signed(mean(differences)) if differences else "–",
        span,
    )
