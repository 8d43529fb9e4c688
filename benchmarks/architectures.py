"""Drive one small architecture of every family of timm and torchvision through every promise of the core.

python -m benchmarks.architectures                                # what has no result yet, two at a time
python -m benchmarks.architectures --only timm/volo_d1_224 --again
python -m benchmarks.architectures --only timm --methods all --jobs 1

For each architecture and method: the output right after inject is the backbone's, bit for bit; every trained parameter
gets a gradient; a mixed batch of three tasks in odd order gives each sample what its task alone gives, in eval mode
and in train mode with gradients; a saved task gives the same output on another copy; a linear method merges; and eject
gives the backbone back, bit for bit, with no weight or buffer changed. Each promise is right, refused with a reason,
wrong, or an exception of another kind (crash). Every architecture has its own process, with a time limit; results are
appended to the CSV file at once.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.driven import CHECKS, COMMON, MORE, Driven, drive
from benchmarks.vision_models import MODELS, VisionModel
from visadapt.errors import nearest
from visadapt.files import replacing
from visadapt.table import Table

RESULTS = Path(__file__).parent / "results" / "architectures.csv"

COLUMNS = ("library", "family", "architecture", "method", "where", *CHECKS, "seconds", "details")

KINDS = ("right", "refused", "wrong", "crash", "too slow")


def work(model: VisionModel, names: Sequence[str], out: Path) -> None:
    """Drive one architecture, and append a row per method."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    driven: Driven | None = None
    for name in names:
        begun = time.perf_counter()
        try:
            driven = driven or Driven(model.build(), model.classes)
            row = drive(driven, (COMMON | MORE)[name], name == names[-1])
        except Exception as error:  # the command counts it
            row = {"start": "crash", "details": f"build: {type(error).__name__}: {error}"[:250]}
        append(out, model, name, {**row, "seconds": f"{time.perf_counter() - begun:.1f}"})
        # what is wrong may not spoil the next method
        driven = driven if not {"wrong", "crash"} & set(row.values()) else None


def append(out: Path, model: VisionModel, name: str, row: dict[str, str]) -> None:
    """Append one row, in one piece: several processes write."""
    one = model.architecture
    begin = {"library": one.library, "family": one.family, "architecture": one.name, "method": name}
    with out.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(begin | row)


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Read the latest row of each architecture and method."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(f"{row['library']}/{row['family']}/{row['architecture']}", row["method"]): row for row in rows}


def write(path: Path, results: dict[tuple[str, str], dict[str, str]]) -> None:
    """Write the latest rows in order, so that the file does not depend on which process was first."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(results.items()))


def counts(rows: Sequence[dict[str, str]]) -> Table:
    """Count the results of each method."""
    tallies = {row["method"]: Counter[str]() for row in rows}
    for row in rows:
        tallies[row["method"]].update([row[check] for check in CHECKS] + ["architectures"])
    tallies["all"] = sum(tallies.values(), Counter())
    tallies["all"]["architectures"] = len({(row["library"], row["architecture"], row["family"]) for row in rows})
    columns = ("architectures", *KINDS)
    return Table(("method", *columns), [(k, *(f"{t[c]:,}" for c in columns)) for k, t in tallies.items()])


def work_alone(model: VisionModel, names: Sequence[str], chosen: argparse.Namespace) -> None:
    """Drive one architecture in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--work", "--only", model.name, "--out", chosen.out]
    try:
        subprocess.run([*command, "--methods", ",".join(names)], timeout=chosen.limit, check=True)
        said = {}
    except subprocess.TimeoutExpired:
        said = {"start": "too slow", "details": f"not done in {chosen.limit:g} s"}
    except subprocess.CalledProcessError as error:
        said = {"start": "crash", "details": f"the process ended with {error.returncode}"}
    done = read(chosen.out)
    for name in names if said else ():
        if (model.name, name) not in done:
            append(chosen.out, model, name, said)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginning of names, such as timm/volo; default: all")
    parser.add_argument("--methods", default="common", help="common, all, or a comma-separated list of methods")
    parser.add_argument("--again", action="store_true", help="drive again what has a result")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument("--limit", type=float, default=600, help="time limit per architecture, in seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    every = {"common": COMMON, "all": COMMON | MORE}.get(chosen.methods)
    chosen.names = list(every) if every else chosen.methods.split(",")
    if unknown := [name for name in chosen.names if name not in COMMON | MORE]:
        parser.error(f"no method {unknown[0]!r}{nearest(unknown[0], [*COMMON, *MORE])}")
    chosen.models = [model for model in MODELS if model.name.startswith(chosen.only)]
    if not chosen.models:
        parser.error(f"no architecture {chosen.only!r}{nearest(chosen.only, [model.name for model in MODELS])}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    chosen = parse(arguments)
    if chosen.work:
        work(chosen.models[0], chosen.names, chosen.out)
        return
    # only rows of what still exists
    known = {model.name for model in MODELS}
    results = {key: row for key, row in read(chosen.out).items() if key[0] in known}
    again = {model.name for model in chosen.models} if chosen.again else set()
    results = {key: row for key, row in results.items() if key[0] not in again or key[1] not in chosen.names}
    write(chosen.out, results)
    todo = [(m, [n for n in chosen.names if (m.name, n) not in results]) for m in chosen.models]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(lambda each: work_alone(*each, chosen), [each for each in todo if each[1]]))
    results = read(chosen.out)
    write(chosen.out, results)
    rows = list(results.values())
    print(*(f"{r['family']} x {r['method']}: {r['details']}" for r in rows if r["details"]), sep="\n")
    print(counts(rows))


if __name__ == "__main__":
    main()
