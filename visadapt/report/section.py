"""A section of a report: what was asked, what is seen, and whether the papers' claims hold here."""

from __future__ import annotations

from dataclasses import dataclass

from visadapt.report.style import Drawing
from visadapt.table import Table


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper against what was measured in one case.

    Args:
        text: the claim, with the threshold that is applied.
        source: the paper that makes it.
        case: the network, problem and method that it is put to the test on.
        holds: whether it does.
        measured: the figures that say so.
    """

    text: str
    source: str
    case: str
    holds: bool
    measured: str

    @property
    def verdict(self) -> str:
        """In words."""
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True)
class Section:
    """One experiment.

    Args:
        name: the experiment's, as in the results.
        title: what was asked.
        finding: what is seen, in a sentence.
        reading: how to read the figures and tables, and which paper's they resemble.
        drawings: the figures.
        tables: the numbers behind them; a table's title is its caption.
        claims: that were put to the test.
    """

    name: str
    title: str
    finding: str
    reading: str
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()
