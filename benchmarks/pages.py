"""Fill the pages that show the evidence, with their figures, from the published results.

python -m benchmarks.pages            # docs/results*.md, and the tables of docs/analysis.md, docs/choosing.md, README
python -m benchmarks.pages --print    # print the tables only

A page keeps its own text; what stands between the comments ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import RESULTS
from benchmarks.regimes import REGIMES
from visadapt.experiments import Result, read_results
from visadapt.report import Claim, Report, build, write
from visadapt.report.advice import Comparison, by_network, comparison_table, lead
from visadapt.report.claims import MAX_TRAINED, STATEMENTS, Statement
from visadapt.report.formatting import join_words, pluralize, signed
from visadapt.report.markdown_page import claims_table
from visadapt.table import Table

ROOT = Path(__file__).parents[1]

PAGES = (ROOT / "docs" / "analysis.md", ROOT / "docs" / "choosing.md", ROOT / "README.md")

MOST = 8
"""Rows of README's table."""


FILES = {"evidence-cuda.csv": "results", "evidence-cpu.csv": "results", "evidence.csv": "results-earlier"}
"""Published results, those that decide first, and the page that each has; the last are of small training sets."""

EARLIER = "in earlier runs with small training sets"


@dataclass(frozen=True)
class Evidence:
    """Published results of one regime.

    Attributes:
        file: CSV file of the results.
        results: the results.
        report: their report.
    """

    file: Path
    results: list[Result]
    report: Report

    @classmethod
    def read(cls, file: Path) -> Evidence | None:
        """Read a file of results; None if it does not compare methods on both texts and images yet."""
        results = read_results(file) if file.is_file() else []
        compared = by_network(results)
        if {r.modality for r in results if r.network in compared} != {"text", "image"}:
            return None
        return cls(file, results, build(results))

    @property
    def page(self) -> str:
        """Name of the page of all its figures and tables."""
        return FILES[self.file.name]


def published() -> list[Evidence]:
    """Read the published evidence: that of the GPU, else of the CPU, and the earlier for what it does not test."""
    pages: dict[str, Evidence] = {}
    for name, page in FILES.items():
        evidence = None if page in pages else Evidence.read(RESULTS / name)
        if evidence is not None:
            pages[page] = evidence
    return list(pages.values())


def blocks(all_evidence: Sequence[Evidence]) -> dict[str, str]:
    """Make the parts of pages that are filled, by name.

    Args:
        all_evidence: what `published` returns.
    """
    decides, *others = all_evidence
    budgets = decides.report.budgets
    before = [claim for each in others for claim in each.report.claims]
    parts = {
        "setting": setting(decides),
        "figures": figures(all_evidence),
        "advice": advice(all_evidence),
        "budgets": "" if budgets is None else budgets.markdown(),
        "summary": summary(decides.results).markdown(),
        "methods": methods(decides.results),
        "earlier methods": "\n\n".join(f"{setting(each)}\n\n{methods(each.results)}" for each in others),
    }
    return parts | {
        f"finding {number}": finding(each, decides.report, before) for number, each in enumerate(STATEMENTS, start=1)
    }


def advice(all_evidence: Sequence[Evidence]) -> str:
    """Say which method to take on each network, in a line each; the first evidence on a network decides."""
    decides, *others = all_evidence
    lines = [f"* {sentence}" for sentence in decides.report.lead]
    known = set(by_network(decides.results))
    for each in others:
        more = [result for result in each.results if result.network not in known]
        lines += [f"* {sentence[:-1]}, {EARLIER}." for sentence in lead(more)]
    return "\n".join(lines)


def setting(evidence: Evidence) -> str:
    """Say what was measured, in which regime and on what."""
    results = evidence.results
    regime = REGIMES.get(results[0].regime or "")
    devices = join_words(sorted({r.machine.get("device", "an unknown device") for r in results}))
    seeds = pluralize(len({r.seed for r in results}), "seed")
    text = f"{len(results):,} results of `benchmarks/results/{evidence.file.name}`, {seeds}, on {devices}"
    if regime is None:
        return f"{text}. Training sets are small: 500 texts, or 2,000 images of 48 px seen once."
    epochs = {kind: " or ".join(map(str, n)) for kind, n in (("t", regime.text_epochs), ("i", regime.image_epochs))}
    return (
        f"{text}. Up to {regime.texts:,} training texts for {epochs['t']} epochs in batches of {regime.text_batch}, "
        f"up to {regime.images:,} augmented training images of {regime.side} px for {epochs['i']} epochs in batches of "
        f"{regime.image_batch}; rate, epochs and activation of every method chosen on {regime.validation} validation "
        f"samples of its own problem, at most {regime.test:,} test samples; heads start as the linear probe; bf16 "
        "autocast for every method but the probe."
    )


def figures(all_evidence: Sequence[Evidence]) -> str:
    """Show the figures of the comparison and of the transfer, each of the first evidence that has one."""
    lines = []
    for name in ("compare", "transfer"):
        sections = [(e, section) for e in all_evidence for section in e.report.sections if section.name == name]
        for evidence, section in sections[:1]:
            lines += [f"![{drawing.alt}]({evidence.page}/{drawing.name}.svg)" for drawing in section.drawings]
    return "\n\n".join(lines)


def finding(statement: Statement, report: Report, before: Sequence[Claim]) -> str:
    """Say what became of a claim, with the figures behind it, and what earlier results say."""
    lines = []
    for claim in (claim for claim in report.claims if claim.text == statement.text):
        old = [c for c in before if (c.text, c.modality) == (claim.text, claim.modality) and c.training_runs]
        lines += [_verdict(claim, claim.case)] if claim.training_runs or not old else []
        lines += [_verdict(each, f"{each.case}, {EARLIER}") for each in old]
    return "\n".join((f"**{statement.text}** ({statement.source}).", "", *lines))


def _verdict(claim: Claim, case: str) -> str:
    runs = pluralize(claim.training_runs, "training run")
    return f"* {case}: **{claim.verdict}** ({runs}): {claim.measured}."


def summary(results: list[Result]) -> Table:
    """Build README's table: on each network the probe, and the best small adapters on validation data, by size."""
    networks = by_network(results)
    rows = []
    for network, comparisons in networks.items():
        small = [c for c in comparisons if c.percent <= MAX_TRAINED]
        probe = [c for c in small if c.name == "linear probe"]
        others = sorted((c for c in small if c not in probe), key=_rank, reverse=True)
        chosen = [*probe, *others[: MOST // max(1, len(networks)) - len(probe)]]
        rows += [_row(network, c) for c in sorted(chosen, key=lambda c: c.percent)]
    headings = ("backbone", "method", "trained", "file", "points", "95 % interval", "problems")
    return Table(headings, rows)


def _rank(comparison: Comparison) -> float:
    return comparison.points if comparison.validation is None else comparison.validation


def _row(network: str, comparison: Comparison) -> tuple[str, ...]:
    size = f"{comparison.bytes / 1e6:.2f} MB"
    share = f"{comparison.percent:.2f} %"
    points = signed(comparison.points)
    return network, comparison.name, share, size, points, comparison.interval, str(comparison.problems)


def methods(results: list[Result]) -> str:
    """Show every method of each network against full fine-tuning."""
    parts = []
    for network, comparisons in by_network(results).items():
        title = f"### {network}, {pluralize(comparisons[0].problems, 'problem')}"
        parts.append(f"{title}\n\n{comparison_table(comparisons).markdown()}")
    return "\n\n".join(parts)


def filled(text: str, parts: dict[str, str]) -> str:
    """Replace what stands between the comments of a page."""

    def replaced(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- {name} -->\n\n{parts[name]}\n\n<!-- /{name} -->"

    return re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- /\1 -->", replaced, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    args = parser.parse_args()
    all_evidence = published()
    parts = blocks(all_evidence)
    if args.print:
        decides = all_evidence[0]
        tables = decides.report.budgets, summary(decides.results), claims_table(decides.report.claims)
        print(parts["advice"], *tables, sep="\n\n")
        return
    for evidence in all_evidence:
        page = ROOT / "docs" / evidence.page
        for old in page.glob("*.svg"):
            old.unlink()
        write(evidence.file, page)
        page.with_suffix(".html").unlink()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main()
