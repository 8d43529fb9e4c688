"""The claims that results are tested against, each with its threshold and source."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from visadapt.report.section import Claim

MAX_TRAINED = 3.6
"""Trained parameters of Houlsby's adapters on GLUE in % of the backbone (Table 1)."""

MAX_GAP = 0.4
"""Points by which they are below full fine-tuning there."""

MAX_LOSS = 1.0
"""Points below full fine-tuning that the 95 % interval must exclude."""

MAX_RANGE = 1.0
"""Largest difference in points between means that counts as equal."""

MAX_DROP = 2.0
"""Points that the removal of one layer costs at most, according to Houlsby et al."""

MAJORITY_MARGIN = 3.0
"""Points above always predicting the majority class that still count as equal to it."""

HALF_LOSS = 1.0
"""Points below adapters in all layers that still count as no loss."""

STABLE_STD = 1e-2
"""Standard deviation of the initial weights up to which Houlsby et al. find training stable."""

BOTH = ("text", "image")


@dataclass(frozen=True)
class Statement:
    """A claim before it is tested.

    Args:
        text: the claim, with the threshold that is applied.
        source: who makes it.
        modalities: what it is made about.
    """

    text: str
    source: str
    modalities: tuple[str, ...] = BOTH

    def tested(self, case: str, holds: bool | None, measured: str, training_runs: int, modality: str) -> Claim:
        """Return the claim with a verdict; the arguments are fields of `Claim`."""
        return Claim(self.text, self.source, case, holds, measured, training_runs, modality)


NEAR_FULL = Statement(
    f"Adapters are within {MAX_GAP} points of full fine-tuning at ≤ {MAX_TRAINED} % trained parameters, with one "
    f"method and size chosen on validation data, and surely within {MAX_LOSS:g} point",
    "Houlsby et al. 2019, Table 1",
)

NONLINEAR = Statement(
    "A nonlinear bottleneck is better than a linear one of the same size",
    "Houlsby et al. 2019, §2, and Rebuffi et al. 2018",
    ("image",),
)

FLAT = Statement(
    f"The score hardly depends on the width from m = 8 to 256: means within {MAX_RANGE:g} point",
    "Houlsby et al. 2019, §3.6",
)

FEWER = Statement(
    "Adapters reach the best score of top layers with fewer parameters", "Houlsby et al. 2019, Fig. 3"
)  # fmt: skip

SINGLE_LAYER = Statement(
    f"Removing one layer's adapters costs at most {MAX_DROP:g} points", "Houlsby et al. 2019, §3.6"
)  # fmt: skip

LOWER_LAYERS = Statement("Lower layers matter less than upper ones on text", "Houlsby et al. 2019, §3.6", ("text",))

MAJORITY = Statement(
    f"Without any adapter the score drops to that of the majority class, within {MAJORITY_MARGIN:g} points",
    "Houlsby et al. 2019, §3.6",
)

STABLE = Statement(
    f"Training is stable up to a standard deviation of {STABLE_STD:g}: means within {MAX_RANGE:g} point",
    "Houlsby et al. 2019, §3.6",
)

UNFORGOTTEN = Statement(
    "Nothing is forgotten: earlier tasks give the same logits, bit for bit", "Houlsby et al. 2019, §1"
)  # fmt: skip

UPPER_HALF = Statement(
    f"The upper half of the layers suffices on text: within {HALF_LOSS:g} point of all layers",
    "Houlsby et al. 2019, §3.6",
    ("text",),
)

BOTH_ENDS = Statement(
    f"Both ends need adapting on images: the upper half alone is more than {HALF_LOSS:g} point below all layers",
    "Rebuffi et al. 2018, §4.2",
    ("image",),
)

HELPS = Statement(
    "Starting from another domain's adapters is better than starting at random, mean over pairs of domains",
    "this library",
)

DECATHLON = Statement(
    "Adapters score at least as much as full fine-tuning in the decathlon, with one method chosen on validation data",
    "Rebuffi et al. 2018, Table 2",
    ("image",),
)

STATEMENTS = (
    NEAR_FULL, DECATHLON, FLAT, FEWER, NONLINEAR, SINGLE_LAYER, LOWER_LAYERS, MAJORITY, UPPER_HALF, BOTH_ENDS, STABLE,
    UNFORGOTTEN, HELPS,
)  # fmt: skip
"""All claims, in the order of a report."""


def with_untested(claims: Sequence[Claim], modalities: Collection[str]) -> tuple[Claim, ...]:
    """Order claims, and add those about kinds of data that there are results of, but none that test the claim.

    Args:
        claims: the tested claims.
        modalities: kinds of data that there are results of.
    """
    ordered: list[Claim] = []
    for statement in STATEMENTS:
        for modality in statement.modalities:
            own = [claim for claim in claims if (claim.text, claim.modality) == (statement.text, modality)]
            if not own and modality in modalities:
                own = [statement.tested(modality, None, "no results", 0, modality)]
            ordered += own
    return tuple(ordered)
