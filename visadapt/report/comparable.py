"""Results that may be averaged: of one setting, at one learning rate, each seed once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result
from visadapt.report.statistics import grouped, listed

FOUND = ("layers", "majority", "outputs", "stopped", "total")
"""Facts that a measurement finds; the others are what was asked for."""

UNSWEPT = ("ablation", "init_scale")
"""Experiments that have nothing but validation data, and choose nothing by it."""


def settled(results: Sequence[Result]) -> list[Result]:
    """The results without those at a learning rate that validation data, tried at more of them since, has given up.

    Args:
        results: of any experiments, as a folder holds them.

    Raises:
        VisadaptError: what has one name was made in several ways, so that a mean would be of no one of them.
    """
    given_up: set[Result] = set()
    for group in grouped(results, _asked).values():
        # what an older result was made with is not known
        if len({result.setting for result in group} - {None}) > 1:
            raise _mixed(group[0], "are of several settings: sizes, epochs, or data or backbones that share a name")
        finals = [result for result in group if _is_final(result)]
        trials = [result for result in group if not _is_final(result)]
        if len({result.seed for result in finals}) < len(finals):
            chosen = _chosen(finals, trials)
            given_up.update(result for result in finals if result.lr != chosen)
            finals = [result for result in finals if result.lr == chosen]
        for (_, seed, rate), same in grouped([*finals, *trials], lambda r: (r.split, r.seed, r.lr)).items():
            if len(same) > 1:
                raise _mixed(same[0], f"have seed {seed} at lr {rate:g} more than once")
    return [result for result in results if result not in given_up]


def _asked(result: Result) -> tuple[str, ...]:
    """What one figure of a report is the mean of, over seeds."""
    facts = {name: fact for name, fact in result.facts.items() if name not in FOUND}
    told = json.dumps(facts, sort_keys=True)
    return result.experiment, result.network, result.problem, result.contender, result.metric, told


def _is_final(result: Result) -> bool:
    return result.split == "test" or result.experiment in UNSWEPT


def _chosen(finals: Sequence[Result], trials: Iterable[Result]) -> float:
    """The learning rate that an experiment would take now: the best of the first seed's trials."""
    rates = sorted({result.lr for result in finals})
    first = min(grouped(trials, lambda r: r.seed).items(), default=(0, []))[1]
    standing = {result.lr: result.standing for result in first}
    if len(rates) > 1 and not standing.keys() >= set(rates):
        said = listed([f"{rate:g}" for rate in rates])
        raise _mixed(finals[0], f"have one seed at lr {said}, and validation data does not say which to take")
    return max(rates, key=lambda rate: standing.get(rate, 0))


def _mixed(result: Result, why: str) -> VisadaptError:
    return VisadaptError(
        f"results of {result.experiment} for {result.contender} on {result.network}, {result.problem} {why}. They "
        "are no seeds of each other: keep them in folders of their own"
    )
