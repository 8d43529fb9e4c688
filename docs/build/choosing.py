"""Write docs/choosing.md: methods against full fine-tuning, from what ``python -m benchmarks.evidence`` measured.

python docs/build/choosing.py
"""

from pathlib import Path

from visadapt.experiments import read_results
from visadapt.experiments.record import Result
from visadapt.report.advice import against_full
from visadapt.report.comparable import drop_superseded
from visadapt.report.formatting import signed
from visadapt.report.statistics import group_by
from visadapt.table import Table

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "choosing.md"
EVIDENCE = ROOT / "benchmarks" / "results" / "evidence.csv"

INTRO = """# Choose a method

Made by `python docs/build/choosing.py` from `benchmarks/results/evidence.csv`.

Start with `Linear()`, which takes a minute and is the baseline that any adapter must beat. Then:

| you have | take |
| --- | --- |
| images and a ResNet or VGG | `ConvAdapter()`, or `Bottleneck(m=8, activation=None)`, which merges into plain weights |
| images or texts and a Transformer | `LoRA(r=8)`, and epochs chosen on validation data: it gains from more of them |
| thousands of tasks, so that each must be tiny | `Norms()`: a few tens of kB per task on a small encoder |
| time for one training run only | `Bottleneck(m=8)`, the default |

## Measured

All figures are points above or below full fine-tuning on test data, paired with full fine-tuning of the same backbone
on the same problem and seed. The interval is the 95 % confidence interval of the mean over problems and seeds
(Student's t); where it contains 0, no difference could be seen. Training sets are small: 500 texts or 2,000 images;
learning rates were chosen on validation data. [What the results decide](analysis.md) says what that does and does not
show.

Compare methods on your own data with `visadapt experiment compare --problem BACKBONE:FOLDER --results FOLDER`: it
chooses rate, epochs and activation of every method on validation data, and prints the same intervals.

### Which method for which budget

The best mean among the methods that train at most so much of the backbone:
"""

BUDGETS = (0.1, 0.5, 1.5, 3.6, 15.0)
"""Trained parameters in % of the backbone."""

OUTRO = """
## Beyond accuracy

| you need | take |
| --- | --- |
| a plain network at the end | a method that [merges](merging.md): `LoRA`, `SSF`, `Parallel`, `TSA`, `DAN` |
| many tasks in one batch | `Bottleneck`, `LoRA`, `Parallel`, `SSF`: one product for [all tasks](many-tasks.md) |
| the fastest training run | adapters in late stages only, `norms="frozen"`, and `cache_prefix` |
| the least memory in training | any adapter with `norms="frozen"`, and `visadapt.lean(model)` |
| the upper bound to compare with | `Full` |
"""


def table(results: list[Result]) -> Table:
    """Build the table of one network."""
    rows = [
        (
            comparison.name,
            f"{comparison.percent:.2f} %",
            f"{comparison.bytes / 1e6:.2f} MB",
            signed(comparison.points),
            comparison.interval,
            comparison.verdict,
            str(comparison.pairs),
        )
        for comparison in against_full(results)
    ]
    headings = ("method", "of backbone", "file", "points", "95 % interval", "against full fine-tuning", "pairs")
    return Table(headings, rows)


def budgets(networks: dict[str, list[Result]]) -> Table:
    """Build the decision table: the best method of each network within each budget."""
    rows = []
    for network, results in networks.items():
        comparisons = [each for each in against_full(results) if "fine-tuning" not in each.name]
        last = None
        for budget in BUDGETS:
            within = [each for each in comparisons if 0 < each.percent <= budget]
            best = max(within, key=lambda each: each.points, default=None)
            if best is None or best == last:
                # a larger budget buys nothing
                continue
            last = best
            figures = (signed(best.points), best.interval, best.verdict)
            rows.append((network, f"{budget:g} %", best.name, f"{best.bytes / 1e6:.2f} MB", *figures))
    headings = ("network", "at most", "take", "file", "points", "95 % interval", "against full fine-tuning")
    return Table(headings, rows)


def page() -> str:
    """Make the page."""
    compared = drop_superseded([r for r in read_results(EVIDENCE) if r.experiment == "compare"])
    results = [result for result in compared if result.split == "test"]
    networks = group_by(results, lambda r: r.network)
    parts = [INTRO, f"{budgets(networks).markdown()}\n"]
    for network, group in networks.items():
        count = len({r.problem for r in group})
        parts.append(f"### {network}, {count} problems, {len(group)} training runs\n\n{table(group).markdown()}\n")
    return "\n".join(parts) + OUTRO


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
