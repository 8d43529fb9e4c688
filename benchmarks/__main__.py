"""Run all benchmarks, each in its own process, print their figures with the goals, and write them to a CSV file.

python -m benchmarks                                  # everything; resumes an interrupted run
python -m benchmarks --only train_step --again        # one benchmark, measured again
python -m benchmarks --device cuda --budget 240       # in 240 s: first few repeats of everything, then more
python -m benchmarks --adapters-python .adapters/bin/python

Figures are ratios of contenders that take turns in one process. Each is written to the CSV file of its device as soon
as it is known; a run that was interrupted, or whose budget was spent, resumes with the benchmarks that have the fewest
repeats. Create the environment for adapter-hub's library, which pins its own version of transformers, by:
python -m venv .adapters && .adapters/bin/pip install -e ".[bench-adapters]"
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import RESULTS, read, repeats_of, seconds_of, table, updated, write
from benchmarks.jobs import FEW, JOBS, Job, device_name, missing_peers, processor, run
from visadapt.errors import nearest

LEAST = 5.0
"""Seconds below which no benchmark is begun."""


class Session:
    """The runs of one command, and the file that they write.

    Args:
        out: CSV file.
        args: of the command line.
    """

    def __init__(self, out: Path, args: argparse.Namespace) -> None:
        self._out, self._args = out, args
        names = {job.name(args.device) for job in JOBS}
        # figures of benchmarks that are no longer run are not kept
        self.rows = [row for row in read(out) if row["job"] in names]
        self._end = None if args.budget is None else time.monotonic() + args.budget
        self.failed: list[str] = []

    def left(self) -> float:
        """Return the seconds that are left."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def rounds(self, jobs: list[Job]) -> None:
        """Run the benchmarks that have not yet been repeated as often as they should, as far as the budget goes."""
        if self._end is None:
            self._round(jobs, [job.repeats for job in jobs])
            return
        # few repeats of everything come first, so that the end of the budget finds a figure for each goal
        self._round(jobs, [min(FEW, job.repeats) for job in jobs])
        for factor in (1, 3, 10):
            self._round(jobs, [factor * job.repeats for job in jobs])

    def _round(self, jobs: list[Job], repeats: list[int]) -> None:
        names = [job.name(self._args.device) for job in jobs]
        waiting = [
            (job, count, name)
            for job, count, name in zip(jobs, repeats, names, strict=True)
            if name not in self.failed and repeats_of(self.rows, name) < count
        ]
        for done, (job, count, name) in enumerate(waiting):
            left = self.left()
            if left < max(LEAST, 0.5 * seconds_of(self.rows, name)):
                print(f"{name}: no time is left for {count} repeats", file=sys.stderr, flush=True)
                continue
            self._job(job, count, name, left, left / (len(waiting) - done))

    def _job(self, job: Job, count: int, name: str, left: float, share: float) -> None:
        print(f"{name}: {count} repeats", file=sys.stderr, flush=True)
        new: list[dict[str, str]] = []
        before = self.rows

        def record(row: dict[str, str]) -> None:
            new.append(row)
            self.rows = updated(before, name, new)
            write(self._out, self.rows)

        python = self._args.adapters_python if job.module == "encoder_step" else None
        bounds: dict[str, Any] = {}
        if self._end is not None:
            # one benchmark that takes longer than expected may not take the time of all others
            bounds = {"seconds": share, "limit": min(left, 4 * share)}
        ended = run(job, self._args.device, count, record, python=python or sys.executable, **bounds)
        if ended.error:
            self.failed.append(name)
            print(f"{name}: failed: {ended.error}", file=sys.stderr, flush=True)
        elif ended.stopped:
            print(f"{name}: stopped, as its time was spent", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(job.module for job in JOBS))
    parser.add_argument("--only", help=f"comma-separated list of {','.join(names)}; default: all")
    parser.add_argument("--again", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument("--device", default="cpu", help="device to measure on: cpu, cuda or cuda:N")
    parser.add_argument("--budget", type=float, help="seconds for everything; default: as long as it takes")
    parser.add_argument("--adapters-python", help="Python interpreter of the environment with the adapters library")
    parser.add_argument("--out", type=Path, help="CSV file, or folder for it; default: benchmarks/results")
    args = parser.parse_args()
    args.modules = names if args.only is None else args.only.split(",")
    if unknown := [name for name in args.modules if name not in names]:
        parser.error(f"no benchmark {unknown[0]!r}{nearest(unknown[0], names)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"{args.device} is not available: torch {torch.__version__} finds no GPU")
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget must be a positive number of seconds, got {args.budget}")
    return args


def target(out: Path | None, device: str) -> Path:
    """Return the CSV file of a device; in another folder than the published one, it begins with what is published.

    The figures of two processors are never in one file.
    """
    version = torch.__version__.partition("+")[0]
    kind = device_name(device) if device.startswith("cuda") else f"cpu {processor()}"
    words = re.findall(r"\w+", re.sub(r"\(.*?\)", "", kind.lower()))
    name = f"performance-{'-'.join(words)}-float32-torch{version}.csv"
    if out is None:
        return RESULTS / name
    if not out.is_dir():
        return out
    file = out / name
    if not file.exists() and (RESULTS / name).is_file():
        shutil.copyfile(RESULTS / name, file)
    return file


def main() -> None:
    args = parse()
    # so that what runs is stopped with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for line in missing_peers(args.modules, args.adapters_python is not None):
        print(line, file=sys.stderr, flush=True)
    session = Session(target(args.out, args.device), args)
    jobs = [job for job in JOBS if job.module in args.modules]
    if args.again:
        again = {job.name(args.device) for job in jobs}
        session.rows = [row for row in session.rows if row["job"] not in again]
    session.rounds(jobs)
    print(table(session.rows))
    if session.failed:
        sys.exit(f"{len(session.failed)} of {len(jobs)} benchmarks failed")


if __name__ == "__main__":
    main()
