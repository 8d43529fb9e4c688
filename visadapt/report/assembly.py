"""A report: all sections that the results allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result
from visadapt.report.ablation import ablation
from visadapt.report.comparable import settled
from visadapt.report.compare import compare
from visadapt.report.decathlon import decathlon
from visadapt.report.init_scale import init_scale
from visadapt.report.modality import modality
from visadapt.report.section import Section
from visadapt.report.sequence import sequence
from visadapt.report.statistics import grouped
from visadapt.report.tradeoff import tradeoff
from visadapt.report.transfer import transfer

SECTIONS = (compare, tradeoff, ablation, init_scale, sequence, transfer, modality, decathlon)


@dataclass(frozen=True)
class Report:
    """What the results say.

    Args:
        title: of the page.
        sections: one an experiment.
        made_with: devices, versions and commits, each with the number of results made so.
    """

    title: str
    sections: tuple[Section, ...]
    made_with: tuple[str, ...]


def build(results: Sequence[Result], title: str = "Results") -> Report:
    """Makes the sections of all experiments that there are results of.

    Args:
        results: as :func:`visadapt.experiments.read_results` gives them.
        title: of the page.

    Raises:
        VisadaptError: there are none, or too few for any section; or what has one name was made in several ways (with
            other sizes, say), of which no mean can be taken.
    """
    results = settled(results)
    sections = tuple(section for make in SECTIONS if (section := make(results)) is not None)
    if not sections:
        raise VisadaptError(f"{len(results)} results are too few for a report: run an experiment to its end first")
    machines = grouped(results, lambda r: ", ".join(f"{key} {value}" for key, value in sorted(r.machine.items())))
    made = tuple(f"{len(group):,} results: {machine}" for machine, group in machines.items() if machine)
    return Report(title, sections, made)
