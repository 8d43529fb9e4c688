"""Results in groups, and numbers in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import mean, stdev
from typing import TypeVar

from visadapt.experiments.record import Result

Key = TypeVar("Key", bound=Hashable)

FULL = "full fine-tuning"

BASELINES = ("linear probe", "norms only", "biases", "top layers", FULL)
"""How the names of contenders begin that are no adapters."""


def grouped(results: Iterable[Result], by: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """Results by a key, in the order in which the keys come."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(by(result), []).append(result)
    return groups


def percent(results: Iterable[Result]) -> list[float]:
    """Scores in %; a correlation of one is 100 as well."""
    return [100 * result.score for result in results]


def average(results: Sequence[Result]) -> float:
    """Mean score in %."""
    return mean(percent(results))


def spread(results: Sequence[Result]) -> float:
    """Standard deviation of scores in %; 0 of a single one."""
    return stdev(percent(results)) if len(results) > 1 else 0.0


def by_chance(groups: Iterable[Sequence[Result]]) -> str:
    """What seeds alone do, to be read beside a difference of means: ``; seeds alone spread by ± 1.2``."""
    spreads = [spread(group) for group in groups if len(group) > 1]
    return f"; seeds alone spread by ± {mean(spreads):.1f}" if spreads else ""


def told(results: Sequence[Result]) -> str:
    """``75.2 ± 0.6``, or ``75.2`` of a single result; ``–`` of none."""
    if not results:
        return "–"
    middle = signed(average(results)).removeprefix("+")
    return f"{middle} ± {spread(results):.1f}" if len(results) > 1 else middle


def signed(value: float) -> str:
    """``+0.4``, ``−1.2``, ``0.0``."""
    text = f"{abs(value):.1f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"


def is_adapter(contender: str) -> bool:
    """Whether a contender puts something in, rather than training what is there."""
    return not contender.startswith(BASELINES)


def share(result: Result) -> float:
    """Trained parameters in % of the backbone, heads on neither side."""
    return 100 * result.fraction


def amount(value: float) -> str:
    """A percentage to two digits: ``0.23``, ``5.3``, ``100``."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}"


def file_name(*words: str) -> str:
    """Words as the stem of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def counted(count: int, word: str) -> str:
    """``1 problem``, ``3 problems``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def against_full(results: Sequence[Result]) -> dict[str, float]:
    """Contender → points by which it is above full fine-tuning, in the mean over the problems that both were run on."""
    problems = grouped(results, lambda r: (r.network, r.problem))
    gaps: dict[str, list[float]] = {}
    for group in problems.values():
        by = grouped(group, lambda r: r.contender)
        if FULL in by:
            for name, own in by.items():
                gaps.setdefault(name, []).append(average(own) - average(by[FULL]))
    return {name: mean(values) for name, values in gaps.items()}
