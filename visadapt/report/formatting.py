"""Numbers, counts and lists as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import mean

from visadapt.experiments.record import Result
from visadapt.report.statistics import mean_score, score_std


def mean_and_std(results: Sequence[Result]) -> str:
    """Format scores in %: ``75.2 ± 0.6``, ``75.2`` for a single result, ``–`` for none."""
    if not results:
        return "–"
    center = signed(mean_score(results)).removeprefix("+")
    return f"{center} ± {score_std(results):.1f}" if len(results) > 1 else center


def seed_spread(groups: Iterable[Sequence[Result]]) -> str:
    """Format the mean standard deviation over seeds, to be read after a difference of means.

    ``; standard deviation over seeds ± 1.2``; empty if no group has several seeds.
    """
    spreads = [score_std(group) for group in groups if len(group) > 1]
    return f"; standard deviation over seeds ± {mean(spreads):.1f}" if spreads else ""


def signed(value: float) -> str:
    """Format a difference in points: ``+0.4``, ``−1.2``, ``0.0``."""
    text = f"{abs(value):.1f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"


def two_digits(value: float) -> str:
    """Format a percentage with two significant digits: ``0.23``, ``5.3``, ``100``."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"


def file_name(*words: str) -> str:
    """Join words to the stem of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))


def join_words(words: Sequence[str]) -> str:
    """Join words as in ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def pluralize(count: int, word: str) -> str:
    """Format a count: ``1 problem``, ``3 problems``."""
    return f"{count} {word}{'' if count == 1 else 's'}"
