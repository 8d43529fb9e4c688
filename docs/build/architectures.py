"""Write docs/architectures.md: the effect of ``visadapt.inject(model, m=32)`` on one architecture per family.

    python docs/build/architectures.py [--results FILE] [--jobs N] [--limit SECONDS] [NAME ...]
    python docs/build/architectures.py --promises        # only the counts of python -m benchmarks.architectures

Architectures are checked in worker processes, each with a time limit. Results are appended to the results file at once;
architectures that are in it already are not checked again.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import architectures as promises  # noqa: E402
from benchmarks.pages import filled  # noqa: E402
from tests.backbone.architectures import ALL, Architecture, Report, check  # noqa: E402

TABLE = ROOT / "docs" / "architectures.md"


def main() -> None:
    """Check the architectures without a result, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "architectures.jsonl")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=2, help="number of worker processes, one thread each")
    parser.add_argument("--limit", type=float, default=300, help="time limit per architecture, in seconds")
    parser.add_argument("--promises", action="store_true", help="write only the section of every promise")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="architectures to check again (default: all without a result)")
    options = parser.parse_args()
    if options.work:
        work()
        return
    if options.promises:
        page = filled(options.table.read_text(encoding="utf-8"), {"every promise": section()})
        options.table.write_text(page, encoding="utf-8")
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    todo = [a for a in ALL if (a.name in options.names if options.names else str(a) not in known)]
    workers: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(options.jobs):
        workers.put(Worker(options.limit))

    def one(architecture: Architecture) -> Report:
        with taken(workers) as worker:
            return worker.check(architecture)

    with ThreadPoolExecutor(options.jobs) as pool, options.results.open("a") as file:
        for i, (architecture, report) in enumerate(zip(todo, pool.map(one, todo), strict=True), 1):
            print(f"{i}/{len(todo)} {architecture} {'ok' if report.passed else report.error or 'FAILED'}", flush=True)
            file.write(json.dumps(asdict(report)) + "\n")
            file.flush()
    while not workers.empty():
        workers.get().stop()
    known = read(options.results)
    options.table.write_text(table([known[str(a)] for a in ALL if str(a) in known]))


def read(results: Path) -> dict[str, Report]:
    """Read the latest result of each architecture."""
    lines = results.read_text().splitlines() if results.exists() else []
    reports = [Report(**json.loads(line)) for line in lines]
    return {f"{report.library}/{report.name}": report for report in reports}


@contextmanager
def taken(workers: SimpleQueue[Worker]) -> Iterator[Worker]:
    """Borrow a worker from the queue."""
    worker = workers.get()
    try:
        yield worker
    finally:
        workers.put(worker)


class Worker:
    """A process that checks architectures in turn; it is replaced after a timeout and after every twenty checks."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.done = 0
        self.process: subprocess.Popen[str] | None = None

    def check(self, architecture: Architecture) -> Report:
        """Check one architecture."""
        if self.process is None or self.done % 20 == 0:
            self.stop()
            command = [sys.executable, __file__, "--work"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        self.done += 1
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        failed = Report(architecture.library, architecture.family, architecture.name, architecture.title)
        process.stdin.write(f"{architecture}\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(self.limit) else None
        if not line:
            self.stop()
            failed.error = f"not done in {self.limit:g} s" if line is None else "the process died"
            return failed
        return Report(**json.loads(line))

    def stop(self) -> None:
        """Kill the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def work() -> None:
    """Run as a worker: read names from stdin, write one report per name to stdout."""
    by_name = {str(architecture): architecture for architecture in ALL}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            architecture = by_name[line.strip()]
            try:
                report = check(architecture, Path(folder))
            except Exception as error:
                report = Report(architecture.library, architecture.family, architecture.name, architecture.title)
                report.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(json.dumps(asdict(report)), flush=True)


def table(reports: list[Report]) -> str:
    """Make the page."""
    lines = [
        "# Architectures",
        "",
        "The effect of `visadapt.inject(model, m=32)` at the default sites, on the smallest architecture of every",
        "family with random weights. Written by `python docs/build/architectures.py`; the same checks run as tests",
        "(`tests/backbone/test_architectures.py`).",
        "",
        "- **sites**: number of sites per kind; **found**: by *structure*, or *traced* in one run on fake tensors.",
        "- **adapters**: parameters of the bottlenecks, and in % of the backbone without its head.",
        "- **=**: the output right after `inject` is the backbone's, bit for bit.",
        "- **head**: `num_classes=` finds the head.",
        "- **∇**: both projections of every adapter get a gradient.",
        "- **frozen**: training steps in train mode change no parameter or buffer of the backbone, nor its output.",
        "- **file**: a task that is saved and loaded into another copy of the backbone gives the same output.",
        "",
        f"With torch {version('torch')}, timm {version('timm')}, torchvision {version('torchvision')},"
        f" transformers {version('transformers')}.",
        "",
        "| library | architectures | all checks pass |",
        "|---|---|---|",
    ]
    libraries = list(dict.fromkeys(report.library for report in reports))
    tail = ["", "## Every promise", "", "<!-- every promise -->", "", section(), "", "<!-- /every promise -->"]
    for library in libraries:
        of_library = [report for report in reports if report.library == library]
        passed = sum(report.passed for report in of_library)
        lines.append(f"| {library} | {len(of_library)} | {passed} ({100 * passed / len(of_library):.0f} %) |")
    for library in libraries:
        lines += ["", f"## {library}", ""]
        lines.append("| family | architecture | sites | layout | found | adapters | % | = | head | ∇ | frozen | file |")
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
        lines += [row(report) for report in reports if report.library == library]
    failures = [report for report in reports if not report.passed]
    if failures:
        lines += ["", "## Failures", ""]
        lines += [f"- {report.library}/{report.name}: {report.error or 'a check fails'}" for report in failures]
    return "\n".join([*lines, *tail]) + "\n"


def section() -> str:
    """Make the section of what `benchmarks.architectures` found, from its published results."""
    rows = list(promises.read(promises.RESULTS).values())
    reasons = {f"{row['library']} {row['family']}, {row['method']}: {row['details']}" for row in rows if row["details"]}
    said = (
        "Results of every promise of the core, by method (`python -m benchmarks.architectures`): the start, gradients,",
        "mixed batches of three tasks in eval and train mode, the file, merging, the frozen backbone, and eject.",
    )
    listed = "\n".join(f"- {' '.join(reason.split())}" for reason in sorted(reasons))
    return "\n".join(said) + f"\n\n{promises.counts(rows).markdown()}\n\nWhat is not right:\n\n{listed or '- nothing'}"


def row(report: Report) -> str:
    """Make one row of a library's table."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in report.kinds.items())
    share = f"{100 * report.adapters / report.backbone:.1f}" if report.backbone else ""
    marks = [report.identity, report.head, report.gradient, report.frozen, report.file]
    cells = [report.family, f"`{report.title}`", kinds, report.layouts, "traced" if report.traced else "structure"]
    cells += [f"{report.adapters:,}", share, *("✓" if mark else "✗" for mark in marks)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
