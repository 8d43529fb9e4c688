"""Comparable results, which may be averaged: one setting, one learning rate and length, each seed once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result
from visadapt.report.formatting import join_words
from visadapt.report.statistics import group_by

MEASURED = ("kept", "layers", "majority", "outputs", "stopped", "total")
"""Facts that are measured; the others are coordinates of the experiment."""

UNSWEPT = ("ablation", "init_scale")
"""Experiments that measure on validation data only, and choose no learning rate by it."""


def drop_superseded(results: Sequence[Result]) -> list[Result]:
    """Remove final results at learning rates and epochs that a longer sweep on validation data no longer chooses.

    Args:
        results: results of any experiments.

    Returns:
        The remaining results, in the same order.

    Raises:
        VisadaptError: results are of several regimes, or results with the same names have different settings, the same
            seed twice, or several learning rates that validation data does not choose between.
    """
    regimes = sorted({result.regime or "none" for result in results})
    if len(regimes) > 1:
        raise VisadaptError(
            f"the results are of regimes {join_words(regimes)}, which differ in sizes, epochs and precision: report "
            "each by itself"
        )
    superseded: set[Result] = set()
    for group in group_by(results, _coordinates).values():
        # the setting of older results is unknown
        if len({result.setting for result in group} - {None}) > 1:
            raise _mixed(group[0], "have several settings: sizes, epochs, or data or backbones of the same name")
        finals = [result for result in group if _is_final(result)]
        trials = [result for result in group if not _is_final(result)]
        if len({result.seed for result in finals}) < len(finals):
            chosen = _chosen(finals, trials)
            superseded.update(result for result in finals if _choice(result) != chosen)
            finals = [result for result in finals if _choice(result) == chosen]
        for same in group_by([*finals, *trials], lambda r: (r.split, r.seed, *_choice(r))).values():
            if len(same) > 1:
                raise _mixed(same[0], f"have seed {same[0].seed} at lr {same[0].lr:g} more than once")
    return [result for result in results if result not in superseded]


def _coordinates(result: Result) -> tuple[str, ...]:
    """Return what results have in common whose mean over seeds is one figure of a report."""
    facts = {name: fact for name, fact in result.facts.items() if name not in MEASURED}
    facts_text = json.dumps(facts, sort_keys=True)
    return result.experiment, result.network, result.problem, result.contender, result.metric, facts_text


def _is_final(result: Result) -> bool:
    return result.split == "test" or result.experiment in UNSWEPT


def _choice(result: Result) -> tuple[float, int]:
    """Return what validation data chooses: the learning rate and the number of epochs."""
    return result.lr, result.epochs


def _chosen(finals: Sequence[Result], trials: Iterable[Result]) -> tuple[float, int]:
    """Return the rate and epochs that an experiment would choose now: the best of the first seed's trials."""
    choices = sorted({_choice(result) for result in finals})
    first_seed = min(group_by(trials, lambda r: r.seed).items(), default=(0, []))[1]
    scores = {_choice(result): result.standing for result in first_seed}
    if len(choices) > 1 and not scores.keys() >= set(choices):
        rates_text = join_words([f"{rate:g}" for rate in dict.fromkeys(rate for rate, _ in choices)])
        raise _mixed(finals[0], f"have one seed at lr {rates_text}, and no validation results to choose between them")
    return max(choices, key=lambda choice: scores.get(choice, 0))


def _mixed(result: Result, reason: str) -> VisadaptError:
    return VisadaptError(
        f"results of {result.experiment} for {result.contender} on {result.network}, {result.problem} {reason}. They "
        "cannot be averaged: keep them in separate folders"
    )
