"""A report as one self-contained HTML page, for light and dark themes, wide and narrow screens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from visadapt.arguments import takes
from visadapt.report.assembly import Report
from visadapt.report.formatting import pluralize
from visadapt.report.section import Claim, Section
from visadapt.report.style import Drawing, Look, for_both_themes
from visadapt.table import Table

ADVICE = "Which method should I take?"

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2530; --quiet: #56606d; --line: #d4d9e0; --card: #f6f7f9;
        --good: #00674b; --bad: #a33f00; --link: #005a94; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e4e8ee; --quiet: #a3adba; --line: #39424e; --card: #1b2027;
          --good: #3fd0a4; --bad: #f28e4b; --link: #7cc4f0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 0.5rem; padding-top: 1rem;
     border-top: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; list-style: none; margin: 0; padding: 0; }
a { color: var(--link); }
nav a { display: inline-block; padding: 0.35rem 0; }
.finding { font-size: 1.08rem; font-weight: 600; margin: 0.5rem 0; }
.reading, footer { color: var(--quiet); font-size: 0.92rem; }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; min-width: 36rem; height: auto; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1.2rem; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding: 0.3rem 0; }
th, td { padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; padding: 0.5rem 0; }
.claims, .claims ul { list-style: none; margin: 0; padding: 0; }
.claims > li { background: var(--card); border-radius: 0.4rem; margin: 0.6rem 0; padding: 0.6rem 0.9rem;
               font-weight: 600; }
.claims cite, .claims ul { font-weight: 400; font-style: normal; color: var(--quiet); font-size: 0.92rem; }
.claims ul li { margin: 0.25rem 0; padding-left: 0.7rem; border-left: 3px solid var(--good); }
.claims ul li.open { border-left-color: var(--quiet); }
.claims ul li.fails { border-left-color: var(--bad); }
.holds strong { color: var(--good); }
.fails strong { color: var(--bad); }
"""


CLASSES = {True: "holds", False: "fails", None: "open"}
"""Class of a claim's line by its verdict."""


@takes()
def page(report: Report) -> str:
    """Render a report as one HTML page, with figures and style included.

    Args:
        report: the report.

    Returns:
        The page.

    Raises:
        VisadaptError: matplotlib is not installed.

    Examples:
        >>> from visadapt.report import Report, page
        >>> html = page(Report("Digits", advice=None, sections=(), made_with=()))
        >>> "<h1>Digits</h1>" in html
        True
    """
    links = [("advice", ADVICE)] * (report.advice is not None) + [("claims", "Claims")] * bool(report.claims)
    links += [(section.name, section.title) for section in report.sections]
    entries = "".join(f"<li><a href='#{anchor}'>{escape(title)}</a></li>" for anchor, title in links)
    parts = [f"<h1>{escape(report.title)}</h1>", f"<nav aria-label='Sections'><ul>{entries}</ul></nav>"]
    if report.advice is not None:
        tables = "".join(map(_table, report.choices))
        text = "".join(f"<p class='finding'>{escape(sentence)}</p>" for sentence in report.lead)
        parts.append(f"<section id='advice'><h2>{ADVICE}</h2>{text}{tables}</section>")
    if report.claims:
        parts.append(f"<section id='claims'><h2>Claims</h2>{_claims(report.claims)}</section>")
    parts += [_section(section) for section in report.sections]
    environments = "".join(f"<li>{escape(line)}</li>" for line in report.made_with)
    footer = f"<footer><h2>Environments</h2><ul>{environments}</ul></footer>" if environments else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{escape(report.title)}</title>"
        f"<link rel='icon' href='data:,'><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n{footer}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    tables = "".join(_table(table) for table in section.tables)
    return (
        f"<section id='{section.name}'><h2>{escape(section.title)}</h2>"
        f"<p class='finding'>{escape(section.finding)}</p><p class='reading'>{escape(section.reading)}</p>"
        f"{''.join(_figure(drawing) for drawing in section.drawings)}"
        f"<details><summary>Tables</summary>{tables}</details></section>"
    )


def _figure(drawing: Drawing) -> str:
    """Render a figure once, for both themes; on a narrow screen it scrolls."""
    image = base64.b64encode(for_both_themes(drawing.render(Look()))).decode()
    alt = escape(drawing.alt)
    return (
        f'<figure class="scroll" tabindex="0" aria-label="{escape(drawing.name)}">'
        f'<img src="data:image/svg+xml;base64,{image}" alt="{alt}"></figure>'
    )


def _table(table: Table) -> str:
    # a scrollable region must be reachable by keyboard and have a label
    label = escape(table.title, quote=True)
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{table.html()}</div>'


def _claims(claims: Sequence[Claim]) -> str:
    """Render one card per claim, with one line per case that it was tested on; those without results are folded."""
    tested = [claim for claim in claims if claim.training_runs]
    cards = _cards(tested)
    untested = [claim for claim in claims if not claim.training_runs]
    if not untested:
        return cards
    summary = f"{pluralize(len(untested), 'claim')} without results"
    return f"{cards}<details><summary>{summary}</summary>{_cards(untested)}</details>"


def _cards(claims: Sequence[Claim]) -> str:
    cards = []
    for text, source in dict.fromkeys((claim.text, claim.source) for claim in claims):
        cases = "".join(
            f"<li class='{CLASSES[claim.holds]}'><strong>{claim.verdict.capitalize()}</strong> "
            f"({escape(claim.case)}; {pluralize(claim.training_runs, 'training run')}): {escape(claim.measured)}</li>"
            for claim in claims
            if claim.text == text
        )
        cards.append(f"<li>{escape(text)} <cite>({escape(source)})</cite><ul>{cases}</ul></li>")
    return f"<ul class='claims'>{''.join(cards)}</ul>" if cards else ""
