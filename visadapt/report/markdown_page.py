"""A report as Markdown, beside a folder of its figures."""

from __future__ import annotations

from visadapt.report.assembly import Report
from visadapt.report.section import Claim, Section
from visadapt.table import Table


def markdown(report: Report, figures: str) -> str:
    """The page.

    Args:
        report: what to say.
        figures: the folder of the figures, as the page links to it.
    """
    claims = [claim for section in report.sections for claim in section.claims]
    parts = [f"# {report.title}"]
    if claims:
        parts += ["## Claims", _claims(claims)]
    parts += [_section(section, figures) for section in report.sections]
    if report.made_with:
        parts += ["## Made with", "\n".join(f"* {line}" for line in report.made_with)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, figures: str) -> str:
    parts = [f"## {section.title}", section.finding, section.reading]
    parts += [f"![{drawing.alt}]({figures}/{drawing.name}.svg)" for drawing in section.drawings]
    for table in section.tables:
        parts += [f"**{table.title}**", table.markdown()]
    return "\n\n".join(parts)


def _claims(claims: list[Claim]) -> str:
    rows = [
        (claim.text, claim.source, claim.case, claim.verdict if claim.holds else f"**{claim.verdict}**", claim.measured)
        for claim in claims
    ]
    return Table(("claim", "of", "case", "here it", "measured"), rows).markdown()
