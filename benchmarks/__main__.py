"""Run all benchmarks, each in its own process, print their figures with the goals, and write them to a CSV file.

python -m benchmarks                                  # everything; resumes an interrupted run
python -m benchmarks --only train_step --again        # one benchmark, measured again
python -m benchmarks --adapters-python .adapters/bin/python

Create the environment for adapter-hub's library, which pins its own version of transformers, by:
python -m venv .adapters && .adapters/bin/pip install -e ".[bench-adapters]"
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.goals import GOALS, Goal, goal_of
from visadapt.errors import nearest
from visadapt.files import replacing
from visadapt.table import Table

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("job", "figure", "setting", "value", "low", "high", "unit", "repeats", "device", "threads", "torch")


@dataclass(frozen=True)
class Job:
    """One benchmark with its options."""

    module: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in the CSV file."""
        return " ".join((self.module, *self.options))


JOBS = (
    Job("train_step", ("--size", "96", "--repeats", "5")),
    Job("train_step", ("--size", "224", "--repeats", "3")),
    Job("encoder_step", ("--repeats", "3")),
    Job("inference"),
    Job("mixed_batches", ("--tasks", "8")),
    Job("mixed_batches", ("--tasks", "64", "--repeats", "5")),
    Job("prefix"),
    Job("bookkeeping"),
)


def device_name(device: str) -> str:
    """Return the name of a device, for results and file names."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows to a CSV file, atomically."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def run(job: Job, python: str, device: str) -> list[dict[str, str]]:
    """Run one benchmark and return its rows."""
    command = [python, "-m", f"benchmarks.{job.module}", *job.options, "--device", device]
    root = Path(__file__).parents[1]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root).stdout
    facts = {"device": device_name(device), "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    return [{"job": job.name, **json.loads(line), **facts} for line in output.splitlines()]


def with_goals(rows: list[dict[str, str]]) -> list[tuple[Goal, dict[str, str]]]:
    """Return the figures that have a goal, in the order of the goals."""
    return [(goal, row) for goal in GOALS for row in rows if goal_of(row["figure"], row["setting"]) is goal]


def missed(goal: Goal, row: dict[str, str]) -> bool:
    """Whether a figure is above its goal."""
    return float(row["value"]) > goal.most


def table(rows: list[dict[str, str]]) -> Table:
    """Build a table of the figures that have a goal."""
    table_rows = []
    for goal, row in with_goals(rows):
        limit = next((r for r in rows if r["figure"] == goal.limit and r["setting"] == row["setting"]), None)
        verdict = "missed" if missed(goal, row) else "met"
        by_operations = "" if limit is None else formatted(limit)[0]
        cells = (row["figure"], row["setting"], *formatted(row), f"≤ {goal.most:.4g}", verdict, by_operations)
        table_rows.append(cells)
    return Table(("figure", "measured on", "median", "quartiles", "goal", "", "by operations"), table_rows)


def formatted(row: dict[str, str]) -> tuple[str, str]:
    """Format a row's median with its unit, and its quartiles if it was repeated."""
    digits = {"×": 3, "ms": 2, "%": 1}[row["unit"]]
    quartiles = "" if row["repeats"] == "1" else f"{float(row['low']):.{digits}f} to {float(row['high']):.{digits}f}"
    return f"{float(row['value']):.{digits}f} {row['unit']}", quartiles


def chart(rows: list[dict[str, str]], path: Path) -> None:
    """Draw each figure that has a goal as a bar, as a fraction of the goal."""
    from matplotlib.figure import Figure

    bars = with_goals(rows)
    figure = Figure(figsize=(10, 0.35 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    shares = [float(row["value"]) / goal.most for goal, row in bars]
    axes.barh(range(len(bars)), shares, color=["tab:green" if share <= 1 else "tab:red" for share in shares])
    names = [f"{row['figure']}{', ' + goal.at if goal.at else ''}: {formatted(row)[0]}" for goal, row in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the goal (less is better)")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(job.module for job in JOBS))
    parser.add_argument("--only", help=f"comma-separated list of {','.join(names)}; default: all")
    parser.add_argument("--again", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument("--device", default="cpu", help="device to measure on")
    parser.add_argument("--adapters-python", help="Python interpreter of the environment with the adapters library")
    parser.add_argument("--out", type=Path, help="CSV file; default: benchmarks/results/performance-….csv")
    args = parser.parse_args()
    selected = names if args.only is None else args.only.split(",")
    if unknown := [name for name in selected if name not in names]:
        parser.error(f"no benchmark {unknown[0]!r}{nearest(unknown[0], names)}")
    device = device_name(args.device).replace(" ", "-").lower()
    version = torch.__version__.partition("+")[0]
    out = args.out or RESULTS / f"performance-{device}-float32-torch{version}.csv"
    rows = read(out)
    for job in JOBS:
        if job.module not in selected or (not args.again and any(row["job"] == job.name for row in rows)):
            continue
        print(job.name, file=sys.stderr, flush=True)
        python = args.adapters_python if job.module == "encoder_step" and args.adapters_python else sys.executable
        rows = [row for row in rows if row["job"] != job.name] + run(job, python, args.device)
        write(out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
