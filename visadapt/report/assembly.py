"""A report: the sections of all experiments that have results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visadapt.arguments import takes
from visadapt.errors import VisadaptError
from visadapt.experiments.record import Result
from visadapt.printable import printable
from visadapt.report.ablation import ablation
from visadapt.report.advice import advice, budgets, lead
from visadapt.report.claims import with_untested
from visadapt.report.comparable import drop_superseded
from visadapt.report.compare import compare
from visadapt.report.crossmodal import crossmodal
from visadapt.report.decathlon import decathlon
from visadapt.report.formatting import join_words, pluralize
from visadapt.report.init_scale import init_scale
from visadapt.report.modality import modality
from visadapt.report.section import Claim, Section
from visadapt.report.sequence import sequence
from visadapt.report.statistics import group_by
from visadapt.report.tradeoff import tradeoff
from visadapt.report.transfer import transfer
from visadapt.report.twins import with_twins
from visadapt.table import Table

SECTIONS = (compare, tradeoff, ablation, init_scale, sequence, transfer, modality, crossmodal, decathlon)


@dataclass(frozen=True)
class Report:
    """A report of experiments' results.

    Args:
        title: title of the page.
        advice: which method to take on which network, if methods were compared with full fine-tuning.
        sections: one section per experiment.
        made_with: one line per environment (device, versions, commit) with its number of results.
        lead: the advice, one sentence per network.
        budgets: which method to take for which budget of trained parameters.
        claims: every claim about the kinds of data that there are results of, those without results included.

    Examples:
        >>> from visadapt.report import Report
        >>> report = Report("Digits", advice=None, sections=(), made_with=())
        >>> report.choices
        ()
    """

    title: str
    advice: Table | None
    sections: tuple[Section, ...]
    made_with: tuple[str, ...]
    lead: tuple[str, ...] = ()
    budgets: Table | None = None
    claims: tuple[Claim, ...] = ()

    @property
    def choices(self) -> tuple[Table, ...]:
        """The tables that answer which method to take."""
        return tuple(table for table in (self.advice, self.budgets) if table is not None)


@takes()
def build(results: Sequence[Result], title: str | None = None) -> Report:
    """Build a report of all experiments that have results.

    Args:
        results: results, as `visadapt.experiments.read_results` returns them.
        title: title of the page; None names the networks and counts problems and results.

    Returns:
        The report, with one section per experiment.

    Raises:
        VisadaptError: there are too few results for any section, or results with the same names have different
            settings (such as sizes), so that they cannot be averaged.

    Examples:
        >>> from visadapt.experiments import Result
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{seed}", "compare", "image", "resnet18", "digits", "lora r=4", seed, "test",
        ...                   metric="accuracy", score=0.91, lr=1e-3, epochs=3, **sizes) for seed in (0, 1)]
        >>> report = visadapt.report.build(results)
        >>> report.title
        'Adapters on resnet18: 1 problem, 2 results'
        >>> [section.name for section in report.sections]
        ['compare']
    """
    measured = drop_superseded(results)
    results = with_twins(measured)
    sections = tuple(section for build_section in SECTIONS if (section := build_section(results)) is not None)
    if not sections:
        raise VisadaptError(f"{len(results)} results are too few for a report: run an experiment to its end first")
    machines = group_by(measured, lambda r: ", ".join(f"{key} {value}" for key, value in sorted(r.machine.items())))
    made_with = tuple(f"{len(group):,} results: {machine}" for machine, group in machines.items() if machine)
    return Report(
        printable(title) if title else _title(measured),
        advice(results),
        sections,
        made_with,
        lead(results),
        budgets(results),
        with_untested([claim for section in sections for claim in section.claims], {r.modality for r in results}),
    )


def _title(results: Sequence[Result]) -> str:
    networks = sorted({r.network for r in results})
    problems = pluralize(len({r.problem for r in results}), "problem")
    return f"Adapters on {join_words(networks)}: {problems}, {len(results):,} results"
