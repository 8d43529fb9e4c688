"""Figures: their CSV files, one per processor or GPU, and their table and chart beside the goals."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.goals import GOALS, Goal, goal_of
from visadapt.files import replacing
from visadapt.table import Table

RESULTS = Path(__file__).parent / "results"

COLUMNS = (
    "job", "figure", "setting", "value", "low", "high", "unit", "repeats", "device", "threads", "torch", "python",
    "machine",
)  # fmt: skip

TOOK = "wall-clock time of the benchmark"
"""Figure that ends the rows of a benchmark: without it, the benchmark was interrupted."""

DIGITS = {"×": 3, "ms": 2, "%": 1, "MB": 0, "/s": 1, "s": 1, "": 0}
"""Digits after the point, by unit."""


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{column: row.get(column) or "" for column in COLUMNS} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows to a CSV file, atomically."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def repeats_of(rows: list[dict[str, str]], job: str) -> int:
    """Return the repeats that a benchmark was last run to its end with; 0 if it never was."""
    return max((int(row["repeats"]) for row in rows if row["job"] == job and row["figure"] == TOOK), default=0)


def seconds_of(rows: list[dict[str, str]], job: str) -> float:
    """Return the seconds that a benchmark took when it was last run to its end; 0 if it never was."""
    return max((float(row["value"]) for row in rows if row["job"] == job and row["figure"] == TOOK), default=0.0)


def updated(rows: list[dict[str, str]], job: str, new: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put the rows of a benchmark in the place of its earlier ones.

    Of a benchmark that was interrupted, earlier rows stay where there is no new one with as many repeats: what was
    measured is not lost.
    """
    others, own = [row for row in rows if row["job"] != job], [row for row in rows if row["job"] == job]
    if any(row["figure"] == TOOK for row in new):
        return others + new
    earlier = {_group(row): int(row["repeats"]) for row in own}
    kept = [row for row in new if int(row["repeats"]) >= earlier.get(_group(row), 0)]
    groups = {_group(row) for row in kept}
    return others + [row for row in own if _group(row) not in groups] + kept


def _group(row: dict[str, str]) -> tuple[str, str]:
    """What is replaced together: a figure in its setting; all operators of a profile."""
    figure = row["figure"].rpartition(": ")[0] if row["figure"].startswith("profile: ") else row["figure"]
    return figure, row["setting"]


def with_goals(rows: list[dict[str, str]]) -> list[tuple[Goal, dict[str, str]]]:
    """Return the figures that have a goal, in the order of the goals."""
    return [
        (goal, row) for goal in GOALS for row in rows if goal_of(row["figure"], row["setting"], row["device"]) is goal
    ]


def missed(goal: Goal, row: dict[str, str]) -> bool:
    """Whether a figure is on the wrong side of its goal."""
    value = float(row["value"])
    return value < goal.bound if goal.at_least else value > goal.bound


def table(rows: list[dict[str, str]]) -> Table:
    """Build a table of the figures that have a goal."""
    table_rows = []
    for goal, row in with_goals(rows):
        limit = next((r for r in rows if r["figure"] == goal.limit and r["setting"] == row["setting"]), None)
        verdict = "missed" if missed(goal, row) else "met"
        by_operations = "" if limit is None else formatted(limit)[0]
        table_rows.append((row["figure"], row["setting"], *formatted(row), str(goal), verdict, by_operations))
    return Table(("figure", "measured on", "median", "quartiles", "goal", "", "by operations"), table_rows)


def formatted(row: dict[str, str]) -> tuple[str, str]:
    """Format a row's median with its unit, and its quartiles if it was repeated."""
    digits = DIGITS[row["unit"]]
    quartiles = "" if row["repeats"] == "1" else f"{float(row['low']):,.{digits}f} to {float(row['high']):,.{digits}f}"
    return f"{float(row['value']):,.{digits}f} {row['unit']}".strip(), quartiles


def chart(rows: list[dict[str, str]], path: Path) -> None:
    """Draw each figure that has a goal as a bar, as a fraction of the goal."""
    from matplotlib.figure import Figure

    bars = with_goals(rows)
    figure = Figure(figsize=(10, 0.35 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    shares = [_share(goal, row) for goal, row in bars]
    axes.barh(range(len(bars)), shares, color=["tab:red" if missed(*bar) else "tab:green" for bar in bars])
    names = [f"{row['figure']}{', ' + goal.at if goal.at else ''}: {formatted(row)[0]}" for goal, row in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the goal (less is better)")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _share(goal: Goal, row: dict[str, str]) -> float:
    """A figure as a fraction of its goal; of a goal of zero, whether there is anything."""
    value = float(row["value"])
    if goal.at_least:
        return goal.bound / value if value else 2.0
    return value / goal.bound if goal.bound else 1.0 + (value > 0)
