"""Fair comparisons: contenders whose rate, epochs and activation are chosen on validation data, all with equal care."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from visadapt.experiments.catalogue import FULL, contender
from visadapt.experiments.choice import MAX_EXTENSIONS
from visadapt.experiments.contenders import Contender
from visadapt.methods import Bottleneck, Linear

LENGTHS = {"image": (5, 9, 20), "text": (3, 9, 20)}
"""Numbers of epochs to choose from, by modality."""

BATCH_SIZES = {"image": 32, "text": 16}

COMPARED = ("linear probe", "bottleneck m=8", FULL)
"""Contenders of a comparison that names none."""


def fair_contender(
    name: str, modality: str, lengths: Sequence[int] | None = None, fast: bool = False, batch_size: int | None = None
) -> Contender:
    """Build a contender of the catalogue that is chosen and trained like all others of a comparison.

    The learning rates are extended while the best is at an edge, the number of epochs is chosen, the state after the
    best epoch on validation data is kept, and a new head starts as the linear probe. A bottleneck that names no
    activation is also tried without one. A linear probe is the better of the regularised solution and 30 epochs of
    training, on features in single precision.

    Args:
        name: as `visadapt.experiments.contender` takes it.
        modality: ``image`` or ``text``.
        lengths: numbers of epochs to choose from; None for those in `LENGTHS`.
        fast: compute in bf16 autocast.
        batch_size: samples per step; None for that in `BATCH_SIZES`.

    Returns:
        The contender.

    Raises:
        VisadaptError: as `visadapt.experiments.contender`.
    """
    epochs = tuple(lengths or LENGTHS[modality])
    base = contender(name, epochs[0])
    settled = dataclasses.replace(base, extend=True, validated=True).with_recipe(
        batch_size=batch_size or BATCH_SIZES[modality]
    )
    if isinstance(base.method, Linear):
        return settled
    variants = ()
    if isinstance(base.method, Bottleneck) and "activation" not in name:
        variants = (dataclasses.replace(base.method, activation=None),)
    return dataclasses.replace(settled, lengths=epochs, variants=variants).with_recipe(fast=fast)


@dataclass(frozen=True)
class Cost:
    """What one contender costs on one problem.

    Attributes:
        choice: fewest and most training runs to choose the rate, the epochs and the variant.
        epochs: fewest and most passes over the training data of these runs.
        final: fewest and most passes of one final run.
    """

    choice: tuple[int, int]
    epochs: tuple[int, int]
    final: tuple[int, int]


def cost(contender: Contender) -> Cost:
    """Bound the cost of a contender on one problem; trials that diverge count as whole runs."""
    lengths = contender.lengths or (contender.recipe.epochs,)
    rates = len(contender.rates) if len(contender.rates) > 1 else 0
    most_rates = rates + (MAX_EXTENSIONS if contender.extend and rates else 0)
    variants = len(contender.variants)
    return Cost(
        (rates + (len(lengths) > 1) + variants, most_rates + len(lengths) - 1 + variants),
        (
            rates * lengths[0] + sum(lengths[1:2]) + variants * lengths[0],
            most_rates * lengths[0] + sum(lengths[1:]) + variants * lengths[-1],
        ),
        (lengths[0], lengths[-1]),
    )
