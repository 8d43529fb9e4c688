"""A section of a report: findings, figures, tables, and whether the papers' claims hold."""

from __future__ import annotations

from dataclasses import dataclass

from visadapt.report.style import Drawing
from visadapt.table import Table


@dataclass(frozen=True)
class Claim:
    """A paper's claim, tested in one case.

    Args:
        text: the claim, with the threshold that is applied.
        source: the paper.
        case: the network, problem and method that it is tested on.
        holds: whether the claim holds in this case, by the 95 % interval of a mean; None if that cannot be decided.
        measured: the figures behind the verdict.
        training_runs: number of training runs behind the verdict.
        modality: ``image`` or ``text``.

    Examples:
        >>> from visadapt.report import Claim
        >>> claim = Claim("within 0.4 points", "Houlsby et al. 2019", "resnet18, digits", True, "-0.1 to +0.3", 10)
        >>> claim.verdict
        'holds'
    """

    text: str
    source: str
    case: str
    holds: bool | None
    measured: str
    training_runs: int
    modality: str = ""

    @property
    def verdict(self) -> str:
        """``holds`` as words."""
        return "cannot be decided" if self.holds is None else "holds" if self.holds else "does not hold"


@dataclass(frozen=True)
class Section:
    """The section of one experiment.

    Args:
        name: name of the experiment, as in the results.
        title: heading of the section.
        finding: the result in one sentence.
        reading: how to read the figures and tables, and which paper they follow.
        drawings: the figures.
        tables: the numbers of the figures; a table's title is its caption.
        claims: the claims that were tested.

    Examples:
        >>> from visadapt.report import Section
        >>> Section("compare", "Comparison", "The bottleneck is as good.", "Points are means.").claims
        ()
    """

    name: str
    title: str
    finding: str
    reading: str
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()
