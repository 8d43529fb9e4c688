"""Contenders beside full fine-tuning: scores, what validation data chose, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from visadapt.experiments.catalogue import FULL
from visadapt.experiments.record import Result
from visadapt.report.advice import against_full
from visadapt.report.formatting import join_words, mean_and_std, pluralize, signed, two_digits
from visadapt.report.statistics import group_by, mean_score, paired_differences, percent_trained
from visadapt.table import Table


def paired_tables(results: Sequence[Result]) -> list[Table]:
    """Build one table per network of the test results of a comparison.

    Args:
        results: results of one comparison; those on validation data are ignored.

    Returns:
        The tables: a row per contender with its mean score, the learning rates and epochs that were chosen, and its
        difference from full fine-tuning, paired by problem and seed, where that was compared too.
    """
    tests = [r for r in results if r.experiment == "compare" and r.split == "test"]
    return [_table(network, group) for network, group in group_by(tests, lambda r: r.network).items()]


def untrained(results: Sequence[Result]) -> list[str]:
    """Return the contenders of which every test result is the linear probe that their heads started as."""
    tests = group_by([r for r in results if r.split == "test"], lambda r: r.contender)
    return [name for name, runs in tests.items() if all(r.is_probe for r in runs)]


def _table(network: str, results: Sequence[Result]) -> Table:
    compared = {comparison.name: comparison for comparison in against_full(results)}
    problems = group_by(results, lambda r: r.problem)
    rows = []
    for name, runs in group_by(results, lambda r: r.contender).items():
        own = group_by(runs, lambda r: r.problem)
        score = mean_and_std(runs) if len(problems) == 1 else f"{sum(map(mean_score, own.values())) / len(own):.1f}"
        if name in compared:
            each = compared[name]
            difference = (signed(each.points), each.interval, str(each.pairs), each.verdict)
        elif name != FULL and len(pair := paired_differences(runs, [r for r in results if r.contender == FULL])) == 1:
            difference = (signed(*pair), "–", "1", "one seed: no interval")
        else:
            difference = ("–", "–", "–", "the reference" if name == FULL else "not compared")
        rates = join_words(sorted({f"{r.lr:g}" for r in runs}))
        epochs = join_words([str(n) for n in sorted({r.epochs for r in runs})])
        trained = f"{two_digits(max(map(percent_trained, runs)))} %"
        rows.append((name, trained, score, rates, epochs, *difference))
    chosen, differences = ("lr", "epochs"), ("points", "95 % interval", "pairs", "against full fine-tuning")
    metrics = sorted({r.metric for r in results})
    headings = ("method", "of backbone", metrics[0] if len(metrics) == 1 else "score", *chosen, *differences)
    on = f"on {next(iter(problems))}" if len(problems) == 1 else f"over {pluralize(len(problems), 'problem')}"
    seeds = pluralize(len({r.seed for r in results}), "seed")
    title = f"{network} {on}: test {join_words(metrics)} in %, mean over {seeds}"
    if probes := untrained(results):
        title += f"; no epoch of {join_words(probes)} was better on validation data than the linear probe at its start"
    return Table(headings, rows, title)
