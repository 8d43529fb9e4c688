"""Damage every kind of file many times, kill what writes them, and write what happened to docs/reliability.md.

python -m benchmarks.reliability --mutants 20000
python -m benchmarks.reliability --kills 20

Half of the copies have bytes changed; the other half have their description or tensors changed and a digest of their
own, as if by an author who means harm. Reading must refuse a copy with a VisadaptError and change nothing, or give the
same outputs as the intact file; a copy with a digest of its own may give other outputs, but no other exception. No copy
may take twice the memory of the intact file, or 5 seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import kills
from benchmarks.mutants import changed, damaged, resealed
from benchmarks.reliability_subjects import Subject, subjects
from visadapt import VisadaptError
from visadapt.files import replacing
from visadapt.table import Table

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"

SECONDS = 5.0


@dataclass
class Tally:
    """What reading the mutants of one subject did.

    Attributes:
        mutants: number of copies.
        outcomes: how often each outcome came.
        wrong: descriptions of outcomes that must not be.
        seconds: the longest time.
        memory: peak of the mutants beyond that of the intact file, in bytes.
    """

    mutants: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def row(self) -> tuple[str, ...]:
        """Figures for the table."""
        counts = (self.outcomes[key] for key in ("refused", "same outputs", "other outputs"))
        return (f"{self.mutants:,}", *(f"{count:,}" for count in counts), f"{len(self.wrong):,}", f"{self.seconds:.2f}")


def measure(subject: Subject, mutants: int, seed: int, folder: Path) -> Tally:
    """Read damaged copies of a subject's file.

    Args:
        subject: the kind of file.
        mutants: number of copies.
        seed: of the damage.
        folder: for the copies.

    Returns:
        What happened.
    """
    rng, tally, data = random.Random(f"{seed} {subject.name}"), Tally(), subject.file.read_bytes()
    copy = folder / f"copy{subject.file.suffix}"
    _reset_peak()
    start = _peak()
    copy.write_bytes(data)
    expected = subject.use(copy)
    intact, state = _peak() - start, subject.state()
    for number in range(mutants):
        sealed = subject.kind is not None and number % 2 == 1
        if not sealed:
            copy.write_bytes(damaged(data, rng))
        elif subject.kind:
            resealed(subject.file, subject.kind, copy, rng)
        else:
            copy.write_text(json.dumps(changed(json.loads(data), rng)), encoding="utf-8")
        mutant = copy.read_bytes()
        begun, waited = time.process_time(), time.perf_counter()
        try:
            same = subject.use(copy) == expected
            outcome = "same outputs" if same else "other outputs"
            wrong = not same and not sealed and not subject.other
        except VisadaptError:
            outcome, wrong = "refused", False
        except Exception as error:  # what must not be
            outcome, wrong = f"{type(error).__name__}: {error}"[:200], True
        # of the processor, so that other programs do not count; and not for ever on anything else
        seconds, waited = time.process_time() - begun, time.perf_counter() - waited
        if subject.state() != state:
            outcome, wrong = f"{outcome}, and something was changed", True
            state = subject.state()
        wrong = wrong or seconds > SECONDS or waited > 20 * SECONDS
        tally.mutants += 1
        tally.outcomes[outcome] += 1
        tally.seconds = max(tally.seconds, seconds)
        if wrong:
            tally.wrong.append(f"{subject.name}, copy {number}: {outcome} ({seconds:.1f} s)")
            (folder / f"wrong-{subject.file.name}-{number}").write_bytes(mutant)
    tally.memory = _peak() - start
    if tally.memory > 2 * max(intact, 64 << 20):
        tally.wrong.append(f"{subject.name}: {tally.memory / 1e6:.0f} MB, intact {intact / 1e6:.0f} MB")
    return tally


def _reset_peak() -> None:
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5", encoding="utf-8")


def _peak() -> int:
    """Largest memory of this process since the last reset, in bytes; 0 where the system does not say."""
    place = Path("/proc/self/status")
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def run(mutants: int, seed: int, folder: Path) -> dict[str, Tally]:
    """Measure all subjects.

    Args:
        mutants: copies in total.
        seed: of the damage.
        folder: for intact files, copies, and copies that did what must not be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intact = folder / "intact"
        intact.mkdir()
        every = list(subjects(intact))
        return {each.name: measure(each, -(-mutants // len(every)), seed, folder) for each in every}


def table(tallies: dict[str, Tally]) -> Table:
    """One row per kind of file."""
    headings = ("file", "copies", "refused", "same outputs", "other outputs", "wrong", "longest, s")
    return Table(headings, [(name, *tally.row) for name, tally in tallies.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Damage files, kill what writes them, and write the tables to a page.")
    parser.add_argument("--mutants", type=int, default=0, help="number of damaged copies in total, such as 20000")
    parser.add_argument("--kills", type=int, default=0, help="number of kills per kind of work, such as 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args(arguments)
    if not chosen.mutants and not chosen.kills:
        parser.error("give --mutants, --kills or both")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    if chosen.kills:
        # first: what is forked must not have computed anything
        (folder / "kills").mkdir()
        killed = kills.run(chosen.kills, chosen.seed, folder / "kills")
        lost = [line for each in killed.values() for line in each.lost or ()]
        print(kills.table(killed), *lost, sep="\n")
        command = f"`python -m benchmarks.reliability --kills {chosen.kills} --seed {chosen.seed}`"
        total = sum(each.kills for each in killed.values())
        write_page(chosen.page, "--kills", f"{total} kills, {len(lost)} with a loss ({command}):", kills.table(killed))
    if chosen.mutants:
        tallies = run(chosen.mutants, chosen.seed, folder)
        wrong = [line for tally in tallies.values() for line in tally.wrong]
        print(table(tallies))
        print("\n".join(wrong) + f"\n{len(wrong)} wrong; copies in {folder}")
        command = f"`python -m benchmarks.reliability --mutants {chosen.mutants} --seed {chosen.seed}`"
        total = sum(t.mutants for t in tallies.values())
        said = f"{total:,} damaged copies, {len(wrong):,} wrong ({command}):"
        write_page(chosen.page, "--mutants", said, table(tallies))


def write_page(page: Path, option: str, said: str, rows: Table) -> None:
    """Put a table between its marks on a page.

    Args:
        page: the page.
        option: of the command that makes the table; it is in the table's mark.
        said: the sentence above the table.
        rows: the table.
    """
    begin, end = f"<!-- table: python -m benchmarks.reliability {option} -->", "<!-- end of table -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found:
        raise VisadaptError(f"{page} must have the line {begin}")
    after = rest.partition(end)[2]
    with replacing(page) as partial:
        partial.write_text(f"{before}{begin}\n\n{said}\n\n{rows.markdown()}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
