"""A report as Markdown, with its figures in a folder."""

from __future__ import annotations

from collections.abc import Sequence

from visadapt.arguments import takes
from visadapt.printable import markdown_text
from visadapt.report.assembly import Report
from visadapt.report.section import Claim, Section
from visadapt.table import Table


@takes()
def markdown(report: Report, figures: str) -> str:
    """Render a report as Markdown.

    Args:
        report: the report.
        figures: path of the folder of the figures, relative to the page.

    Returns:
        The page.

    Examples:
        >>> from visadapt.report import Report, markdown
        >>> print(markdown(Report("Digits", advice=None, sections=(), made_with=()), "figures"))
        # Digits
        <BLANKLINE>
    """
    parts = [f"# {markdown_text(report.title)}"]
    if report.advice is not None:
        parts += [
            "## Which method should I take?",
            "\n".join(f"* {markdown_text(sentence)}" for sentence in report.lead),
        ]
        parts += [part for table in report.choices for part in (f"{markdown_text(table.title)}.", table.markdown())]
    if report.claims:
        parts += ["## Claims", claims_table(report.claims).markdown()]
    parts += [_section(section, figures) for section in report.sections]
    if report.made_with:
        parts += ["## Environments", "\n".join(f"* {markdown_text(line)}" for line in report.made_with)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, figures: str) -> str:
    parts = [f"## {markdown_text(section.title)}", *map(markdown_text, (section.finding, section.reading))]
    parts += [f"![{markdown_text(drawing.alt)}]({figures}/{drawing.name}.svg)" for drawing in section.drawings]
    for table in section.tables:
        parts += [f"**{markdown_text(table.title)}**", table.markdown()]
    return "\n\n".join(parts)


def claims_table(claims: Sequence[Claim]) -> Table:
    """Build the table of claims with their verdicts."""
    rows = [
        (
            claim.text,
            claim.source,
            claim.case,
            claim.verdict if claim.holds is not False else f"**{claim.verdict}**",
            claim.measured,
            str(claim.training_runs),
        )
        for claim in claims
    ]
    return Table(("claim", "source", "case", "verdict", "measured", "training runs"), rows)
