"""Fill the pages that show the evidence, with their figures, from the published results.

python -m benchmarks.pages            # docs/results.md, docs/choosing.md, and the tables of docs/analysis.md and README
python -m benchmarks.pages --print    # print the tables only

A page keeps its own text; what stands between the comments ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import RESULTS
from benchmarks.regimes import REGIMES
from visadapt.experiments import Result, read_results
from visadapt.report import Claim, Report, build, write
from visadapt.report.advice import Comparison, by_network, comparison_table
from visadapt.report.claims import MAX_TRAINED, STATEMENTS, Statement
from visadapt.report.formatting import join_words, pluralize, signed
from visadapt.report.markdown_page import claims_table
from visadapt.table import Table

ROOT = Path(__file__).parents[1]

PAGES = (ROOT / "docs" / "analysis.md", ROOT / "docs" / "choosing.md", ROOT / "README.md")

MOST = 8
"""Rows of README's table."""


EARLIER = RESULTS / "evidence.csv"
"""Results of smaller training sets, for the claims that nothing else tests."""


def published() -> Path:
    """Return the file of the published evidence: that of the GPU, if it exists."""
    file = RESULTS / "evidence-cuda.csv"
    return file if file.is_file() else EARLIER


def earlier() -> tuple[Claim, ...]:
    """Return the claims as earlier results test them; none if these are the published ones."""
    return build(read_results(EARLIER)).claims if published() != EARLIER and EARLIER.is_file() else ()


def blocks(results: list[Result], report: Report, before: Sequence[Claim] = ()) -> dict[str, str]:
    """Make the parts of pages that are filled, by name.

    Args:
        results: the published results.
        report: their report.
        before: what `earlier` returns.
    """
    parts = {
        "setting": setting(results),
        "figures": figures(report),
        "advice": "\n".join(f"* {sentence}" for sentence in report.lead),
        "budgets": "" if report.budgets is None else report.budgets.markdown(),
        "summary": summary(results).markdown(),
        "methods": methods(results),
    }
    return parts | {
        f"finding {number}": finding(each, report, before) for number, each in enumerate(STATEMENTS, start=1)
    }


def setting(results: list[Result]) -> str:
    """Say what was measured, in which regime and on what."""
    regime = REGIMES.get(results[0].regime or "")
    devices = join_words(sorted({r.machine.get("device", "an unknown device") for r in results}))
    seeds = pluralize(len({r.seed for r in results}), "seed")
    text = f"{len(results):,} results of `benchmarks/results/{published().name}`, {seeds}, on {devices}"
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


def figures(report: Report) -> str:
    """Show the figures of the comparison, of the transfer between domains and of the decathlon."""
    shown = [d for section in report.sections for d in section.drawings if section.name in ("compare", "transfer")]
    return "\n\n".join(f"![{drawing.alt}](results/{drawing.name}.svg)" for drawing in shown)


def finding(statement: Statement, report: Report, before: Sequence[Claim]) -> str:
    """Say what became of a claim, with the figures behind it; without any, what earlier results say."""
    lines = []
    for claim in (claim for claim in report.claims if claim.text == statement.text):
        old = [c for c in before if (c.text, c.modality) == (claim.text, claim.modality) and c.training_runs]
        if claim.training_runs or not old:
            lines.append(_verdict(claim, claim.case))
        else:
            lines += [_verdict(each, f"{each.case}, in earlier runs with small training sets") for each in old]
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
    results = read_results(published())
    report = build(results)
    parts = blocks(results, report, earlier())
    if args.print:
        print(*report.lead, report.budgets, summary(results), claims_table(report.claims), sep="\n\n")
        return
    for old in (ROOT / "docs" / "results").glob("*.svg"):
        old.unlink()
    write(published(), ROOT / "docs" / "results")
    (ROOT / "docs" / "results.html").unlink()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main()
