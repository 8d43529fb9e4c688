"""Measures all figures, each benchmark in a process of its own, prints them beside their goals, keeps them as CSV.

python -m benchmarks                                  # everything; goes on where an earlier run was cut short
python -m benchmarks --only train_step --again        # some of it, anew
python -m benchmarks --adapters-python .adapters/bin/python

The environment of adapter-hub's library, which pins its own transformers:
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
from visadapt.files import replacing
from visadapt.table import Table

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("job", "figure", "setting", "value", "low", "high", "unit", "repeats", "device", "threads", "torch")


@dataclass(frozen=True)
class Job:
    """One benchmark with its numbers."""

    module: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the CSV has it."""
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
    """For people, and for the name of a file."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes them whole."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def run(job: Job, python: str, device: str) -> list[dict[str, str]]:
    """The rows of one benchmark."""
    command = [python, "-m", f"benchmarks.{job.module}", *job.options, "--device", device]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    facts = {"device": device_name(device), "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    return [{"job": job.name, **json.loads(line), **facts} for line in said.splitlines()]


def with_goals(rows: list[dict[str, str]]) -> list[tuple[Goal, dict[str, str]]]:
    """The figures that have a goal, in the order of the goals."""
    return [(goal, row) for goal in GOALS for row in rows if goal_of(row["figure"], row["setting"]) is goal]


def missed(goal: Goal, row: dict[str, str]) -> bool:
    """Whether a figure is above its goal."""
    return float(row["value"]) > goal.most


def table(rows: list[dict[str, str]]) -> Table:
    """The figures with a goal, each beside it."""
    shown = []
    for goal, row in with_goals(rows):
        limit = next((r for r in rows if r["figure"] == goal.limit and r["setting"] == row["setting"]), None)
        verdict = "missed" if missed(goal, row) else "met"
        by_operations = "" if limit is None else told(limit)[0]
        shown.append((row["figure"], row["setting"], *told(row), f"≤ {goal.most:.4g}", verdict, by_operations))
    return Table(("figure", "measured on", "median", "quartiles", "goal", "", "by operations"), shown)


def told(row: dict[str, str]) -> tuple[str, str]:
    """A row's median with its unit, and its quartiles if it was repeated."""
    digits = {"×": 3, "ms": 2, "%": 1}[row["unit"]]
    quartiles = "" if row["repeats"] == "1" else f"{float(row['low']):.{digits}f} to {float(row['high']):.{digits}f}"
    return f"{float(row['value']):.{digits}f} {row['unit']}", quartiles


def chart(rows: list[dict[str, str]], path: Path) -> None:
    """Each figure with a goal, as a bar of its share of that goal."""
    from matplotlib.figure import Figure

    bars = with_goals(rows)
    figure = Figure(figsize=(10, 0.35 * len(bars) + 1), layout="constrained")
    axes = figure.subplots()
    shares = [float(row["value"]) / goal.most for goal, row in bars]
    axes.barh(range(len(bars)), shares, color=["tab:green" if share <= 1 else "tab:red" for share in shares])
    names = [f"{row['figure']}{', ' + goal.at if goal.at else ''}: {told(row)[0]}" for goal, row in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the goal (less is better)")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(job.module for job in JOBS))
    parser.add_argument("--only", help=f"some of {','.join(names)}, separated by commas")
    parser.add_argument("--again", action="store_true", help="measure anew what an earlier run has measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapters-python", help="interpreter of the environment that adapters is installed in")
    parser.add_argument("--out", type=Path, help="CSV file; by default benchmarks/results/performance-….csv")
    asked = parser.parse_args()
    wanted = names if asked.only is None else asked.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(names)}")
    device = device_name(asked.device).replace(" ", "-").lower()
    version = torch.__version__.partition("+")[0]
    out = asked.out or RESULTS / f"performance-{device}-float32-torch{version}.csv"
    rows = read(out)
    for job in JOBS:
        if job.module not in wanted or (not asked.again and any(row["job"] == job.name for row in rows)):
            continue
        print(job.name, file=sys.stderr, flush=True)
        python = asked.adapters_python if job.module == "encoder_step" and asked.adapters_python else sys.executable
        rows = [row for row in rows if row["job"] != job.name] + run(job, python, asked.device)
        write(out, rows)
    chart(rows, out.with_suffix(".svg"))
    print(table(rows))


if __name__ == "__main__":
    main()
